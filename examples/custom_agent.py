"""Two agents of your own: one that runs on Trio, one that is a plain function and runs in a thread.

python examples/custom_agent.py --port 8080
hector serve --config configs/custom-agent.yaml      # the first one, named by a configuration
"""

import argparse
from collections import Counter

import trio

from hector_trio import Context, Hector, SyncContext

app = Hector()


@app.agent("travel_planner", name="Travel planner", description="Plans a trip, step by step")
async def travel_planner(ctx: Context) -> None:
    """Emits its answer as it thinks of it. In a session it remembers where it has already been."""
    place = ctx.text.split(" to ")[-1].strip(" .!?") or "nowhere"
    been = ctx.state.get("been", [])
    if been:
        await ctx.emit_text(f"After {' and '.join(been)}, now {place}. ")

    plan = []
    for day, what in enumerate((f"arrive in {place}", "see the old town", "walk along the river", "go home"), start=1):
        await ctx.emit_text(f"Day {day}: {what}. ")  # seen at once by whoever follows
        plan.append({"day": day, "what": what})
        await trio.sleep(0.05)  # a cancel arrives here, or at any other await

    await ctx.emit_data({"place": place, "plan": plan})
    if ctx.session_id is not None:
        await ctx.update_state({"been": [*been, place]})


@app.agent("word_counter", name="Word counter", description="Counts the words of a text")
def word_counter(ctx: SyncContext) -> None:
    """The same context without ``await``: blocking libraries are welcome here."""
    words = ctx.text.lower().split()
    ctx.emit_text(f"{len(words)} words, {len(set(words))} different ones.")
    ctx.emit_data(dict(Counter(words).most_common(3)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8080)
    app.run(port=parser.parse_args().port)
