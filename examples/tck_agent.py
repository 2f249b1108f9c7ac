"""The agent that A2A's conformance kit (a2a-tck) talks to: what it does depends on how the id of the message begins.

hector serve --config configs/tck.yaml            # everything on
hector serve --config configs/tck-minimal.yaml    # everything off, and an extension that clients must declare
hector serve --config configs/tck-legacy.yaml     # for the kit of 0.3
"""

from collections.abc import Awaitable, Callable

import trio

from hector_trio import Context, Part

Behaviour = Callable[[Context], Awaitable[None]]

FILE = Part(raw=b"Hello from the file\n", filename="output.txt", media_type="text/plain")
FILE_URL = Part(url="https://example.com/output.txt", filename="output.txt", media_type="text/plain")
DATA = Part(data={"key": "value", "count": 42})

EXTENSION = "urn:a2a:tck:required-extension"

LONG = 5.0
"""Seconds for which a task can be subscribed to; the kit wants four at least."""


def says(*parts: str | Part) -> Behaviour:
    """One artifact, and the end."""

    async def behave(ctx: Context) -> None:
        await ctx.emit_status()
        await ctx.artifact(*parts, name="output")

    return behave


async def completes(ctx: Context) -> None:
    await ctx.emit_text("Hello from TCK")


async def says_nothing(ctx: Context) -> None:
    pass


async def replies(ctx: Context) -> None:
    await ctx.reply("Direct message response")


async def asks(ctx: Context) -> None:
    await ctx.ask("What else?")


async def asks_for_permission(ctx: Context) -> None:
    await ctx.ask("May I?", auth=True)


async def rejects(ctx: Context) -> None:
    await ctx.reject("rejected")


async def says_in_pieces(ctx: Context) -> None:
    await ctx.emit_status()
    made = await ctx.artifact("chunk-1 ", name="output")
    await ctx.artifact("chunk-2", artifact_id=made, append=True, last=True)


async def takes_long(ctx: Context) -> None:
    await ctx.emit_status("Working")
    await trio.sleep(LONG)


async def takes_a_while(ctx: Context) -> None:
    await ctx.emit_status("Working")
    await trio.sleep(1)
    await ctx.emit_text("Hello from TCK")


async def needs_an_extension(ctx: Context) -> None:
    if ctx.agent_id == "tck-minimal":
        ctx.require_extension(EXTENSION)
    await ctx.emit_text("Hello from TCK")


BEHAVIOURS: dict[str, Behaviour] = {
    "tck-complete-task": completes,
    "tck-artifact-text": says("Generated text content"),
    "tck-artifact-file": says(FILE),
    "tck-artifact-file-url": says(FILE_URL),
    "tck-artifact-data": says(DATA),
    "tck-message-response": replies,
    "tck-input-required": asks,
    "tck-auth-required": asks_for_permission,
    "tck-reject-task": rejects,
    "tck-stream-001": says("Stream hello from TCK"),
    "tck-stream-002": says_nothing,
    "tck-stream-003": says("Stream task lifecycle"),
    "tck-stream-ordering-001": says("Ordered output"),
    "tck-stream-artifact-text": says("Streamed text content"),
    "tck-stream-artifact-file": says(FILE),
    "tck-stream-artifact-chunked": says_in_pieces,
    "test-resubscribe-message-id": takes_long,
    "tck-delayed-complete": takes_a_while,
    "tck-cap-ext": needs_an_extension,
}


def behaviour(ctx: Context, otherwise: Behaviour) -> Behaviour:
    """What the longest prefix of the message's id says, also of one that answers."""
    message_id = ctx.message.message_id if ctx.message is not None else ""
    named = [prefix for prefix in BEHAVIOURS if message_id.startswith(prefix)]
    return BEHAVIOURS[max(named, key=len)] if named else otherwise


async def tck(ctx: Context) -> None:
    """For the kit of 1.0: what it says nothing about completes."""
    await behaviour(ctx, completes)(ctx)


async def tck_legacy(ctx: Context) -> None:
    """For the kit of 0.3, which goes on with its tasks and cancels them: they wait for more."""
    await behaviour(ctx, asks if ctx.message is not None else completes)(ctx)
