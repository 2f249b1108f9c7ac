"""Talks to an agent with hector's own client: a session, a stream, two ways to cancel, a task that runs by itself.

python examples/python_client.py [SERVER]
"""

import os
import sys

import trio

from hector_trio import Client

SERVER = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("HECTOR_SERVER", "http://localhost:8080")


async def main():
    async with Client(SERVER, token=os.environ.get("HECTOR_TOKEN")) as client:
        session = await client.create_session("assistant", metadata={"client": "python_client.py"})

        # A conversation: wait for the whole answer, or have it as it comes.
        await client.run("assistant", "My name is Alice", session_id=session.session_id)
        print("agent: ", end="")
        async with client.stream("assistant", "What is my name?", session_id=session.session_id) as chunks:
            async for chunk in chunks:
                if chunk.chunk_type == "text":
                    print(chunk.content, end="", flush=True)
        print(f"\n({chunks.final.status})")

        # Cancel by asking: the stream goes on to its final chunk.
        async with client.stream("assistant", "Count to 1000") as chunks:
            await anext(chunks)
            await chunks.cancel("seen enough")
            async for chunk in chunks:
                last = chunk
        print(f"asked to stop: {last.status}, because {last.reason}")

        # Cancel by leaving: whatever ends the block (here a break) closes the socket, and the server ends the run.
        async with client.stream("assistant", "Count to 1000") as chunks:
            async for chunk in chunks:
                if chunk.seq >= 20:
                    break
        async with client.events("assistant", chunks.task_id) as log:
            async for chunk in log:
                last = chunk
        print(f"left: {last.status} after {last.seq} chunks")

        # A task that needs nobody to watch it; its log can be read by anybody, from any number on, at any time.
        task = await client.submit("assistant", "What are AI agents?", session_id=session.session_id)
        async with client.events("assistant", task.task_id) as log:
            print("agent: ", "".join([chunk.content async for chunk in log if chunk.chunk_type == "text"]))

        for message in await client.messages(session.session_id):
            print(f"{message.role:>5} | {message.content[:60]}")
        await client.delete_session(session.session_id)


trio.run(main)
