"""Streams one answer over a WebSocket, with the websocket-client package.

pip install websocket-client
python examples/test-streaming.py "Explain quantum computing"
"""

import argparse
import json
import os
import sys

import websocket

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt", nargs="?", default="Write a short poem about AI")
parser.add_argument("--server", default=os.environ.get("HECTOR_SERVER", "http://localhost:8080"))
parser.add_argument("--agent", default="assistant")
options = parser.parse_args()

ended_as = "cut"  # until the final chunk says how the task ended


def on_open(ws):
    ws.send(json.dumps({"input": {"type": "text/plain", "content": options.prompt}}))


def on_message(ws, message):
    global ended_as
    chunk = json.loads(message)
    if chunk["chunkType"] == "text":
        print(chunk["content"], end="", flush=True)
    else:
        print(f"\n[{chunk['chunkType']}] {chunk['content']}")
    if chunk["final"]:
        ended_as = chunk["status"]
        ws.close()


def on_error(ws, error):
    print(error, file=sys.stderr)


# http://… becomes ws://…, https://… becomes wss://…
url = options.server.rstrip("/").replace("http", "ws", 1) + f"/agents/{options.agent}/stream"
websocket.WebSocketApp(url, on_open=on_open, on_message=on_message, on_error=on_error).run_forever()
print(ended_as)
sys.exit(0 if ended_as == "completed" else 1)
