"""Talks to an agent from Trio: a session, answers that stream, and a cancel by leaving.

pip install trio trio-websocket httpx2
python examples/trio_client.py [SERVER]
"""

import json
import os
import sys

import httpx2
import trio
from trio_websocket import open_websocket_url

SERVER = (sys.argv[1] if len(sys.argv) > 1 else os.environ.get("HECTOR_SERVER", "http://localhost:8080")).rstrip("/")
STREAM = SERVER.replace("http", "ws", 1) + "/agents/assistant/stream"


async def ask(session_id, prompt, *, leave_after=None):
    """Prints the answer as it comes. ``leave_after`` that many chunks, the block below is left in the middle: the
    socket closes, and the server cancels what it started. Returns the task's id."""
    print(f"\nyou:   {prompt}\nagent: ", end="")
    seen = 0
    async with open_websocket_url(STREAM) as ws:
        request = {"input": {"type": "text/plain", "content": prompt}, "context": {"sessionId": session_id}}
        await ws.send_message(json.dumps(request))
        while True:
            chunk = json.loads(await ws.get_message())
            if chunk["chunkType"] == "text":
                print(chunk["content"], end="", flush=True)
            elif chunk["chunkType"] == "error":
                print(f"[{chunk['content']}]", end="", flush=True)
            seen += 1
            if chunk["final"] or seen == leave_after:
                print()
                return chunk["taskId"]


async def final_chunk(http, task_id):
    """The last chunk of a task's log, waited for: the log is followed as server-sent events, which end after it."""
    chunk = None
    headers = {"Accept": "text/event-stream"}
    async with http.stream("GET", f"/agents/assistant/tasks/{task_id}/events", headers=headers) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if line.startswith("data:"):
                chunk = json.loads(line[5:])
    return chunk


async def main():
    async with httpx2.AsyncClient(base_url=SERVER, timeout=30) as http:
        session = (await http.post("/sessions", json={"agentId": "assistant"})).raise_for_status().json()
        session_id = session["sessionId"]

        await ask(session_id, "My name is Alice")
        await ask(session_id, "What is my name?")

        task_id = await ask(session_id, "Count to 1000", leave_after=20)
        final = await final_chunk(http, task_id)
        print(f"\nLeft after 20 chunks: the server ended the task as {final['status']!r} at chunk {final['seq']}.")

        (await http.delete(f"/sessions/{session_id}")).raise_for_status()


trio.run(main)
