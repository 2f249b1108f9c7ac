"""The same server under plain Hypercorn, for deployments that start Hypercorn themselves.

hypercorn -k trio examples.hypercorn_app:app
"""

from hector_trio import Context, Hector

hector = Hector()


@hector.agent("parrot", description="Says it again, one word at a time")
async def parrot(ctx: Context) -> None:
    for word in ctx.text.split():
        await ctx.emit_text(word + " ")


app = hector.asgi  # an ASGI application; reading it installs the connection class that makes Hypercorn safe
