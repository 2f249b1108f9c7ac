"""What clients of others talk to: an agent that does what its prompt begins with, and one that lets it go on."""

from __future__ import annotations

from collections import defaultdict

import trio

from hector_trio import Context, Part
from hector_trio.errors import RunError

gates: defaultdict[str, trio.Event] = defaultdict(trio.Event)
stopped: set[str] = set()


async def speak(ctx: Context) -> None:
    word, _, name = ctx.text.partition(" ")
    if ctx.resume is not None:
        await ctx.emit_text(f"got {ctx.resume.answer}")
        return
    match word:
        case "parts":
            await ctx.emit_status("thinking")
            await ctx.emit_data({"n": 1})
            await ctx.emit_bytes(b"\x00\xff", "image/png")
            await ctx.artifact(Part(text="doc"), {"k": [1]}, artifact_id="A", name="Doc")
            await ctx.artifact(" more", artifact_id="A", append=True, last=True)
            await ctx.artifact(Part(url="https://x.example/y", media_type="text/plain", filename="y"), artifact_id="B")
            await ctx.emit_text("done")
        case "count":
            for number in range(int(name)):
                await ctx.emit_text(f"{number} ")
        case "hold":
            await ctx.emit_text("one ")
            await gates[name].wait()
            await ctx.emit_text("two ")
            await gates[f"{name}!"].wait()
            await ctx.emit_text("three")
        case "slow":
            await ctx.emit_text("begun ")
            try:
                await trio.sleep_forever()
            finally:
                stopped.add(name)
        case "ask":
            await ctx.ask("Which?")
        case "login":
            await ctx.ask("Who are you?", auth=True)
        case "fail":
            raise RunError("out_of_stock", "Nothing left")
        case "reject":
            await ctx.reject("Not on Sundays")
        case "reply":
            await ctx.reply("Just this")
        case _:
            for each in ("You ", "said: ", ctx.text):
                await ctx.emit_text(each)


async def release(ctx: Context) -> None:
    """Opens a gate; says whether the work of this name was stopped."""
    gates[ctx.text].set()
    await ctx.emit_data({"stopped": ctx.text in stopped})
