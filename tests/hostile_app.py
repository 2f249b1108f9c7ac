"""A small application for Hypercorn's own command line; importing it installs the connection classes."""

import os

import trio
from quart import websocket

from hector_trio.connection import install
from hector_trio.transports.quart_app import HectorQuart

if not os.environ.get("HECTOR_TEST_WITHOUT_INSTALL"):
    install()

app = HectorQuart(__name__)


@app.route("/", methods=["GET", "POST"])
async def index() -> str:
    return "here"


@app.websocket("/ws")
async def echo() -> None:
    while True:
        await websocket.send(await websocket.receive())


@app.websocket("/slow")
async def slow() -> None:
    """Lets its client wait for the answer to the upgrade."""
    await trio.sleep_forever()
