"""The agents of the soaked server: one that does what its input says, one that counts what lives in the process."""

from __future__ import annotations

import gc
import threading

import trio

from hector_trio import Context


async def talk(ctx: Context) -> None:
    """``end N``: N words. ``hold N``: N words, then nothing for ever. ``ask N``: N words, a question, N words."""
    what, count = ctx.text.split()
    if ctx.resume is not None:
        what, count = "end", ctx.resume.saved
    for n in range(int(count)):
        await ctx.emit_text(f"word {n} ")
    if what == "hold":
        await trio.sleep_forever()
    if what == "ask":
        await ctx.ask("more?", saved=count)


async def census(ctx: Context) -> None:
    gc.collect()
    await ctx.emit_data({
        "tasks": trio.lowlevel.current_statistics().tasks_living,
        "objects": len(gc.get_objects()),
        "threads": threading.active_count(),
    })  # fmt: skip
