"""Requests to others: bounds, and leaving in the middle. (The models' tests hold the pool and the handshakes.)"""

from __future__ import annotations

from contextlib import aclosing

import httpx2
import pytest
import trio

from hector_trio.outgoing import TooLarge, read_whole, send
from tests.fake_model import sends, serve_fake_model, stalls


async def test_an_answer_is_read_whole_up_to_its_bound() -> None:
    async with trio.open_nursery() as nursery, httpx2.AsyncClient(trust_env=False) as client:
        fake = await serve_fake_model(nursery)
        fake.default = sends(b"x" * 1000)
        with trio.fail_after(5):
            for _ in range(2):
                async with aclosing(await send(client, client.build_request("GET", fake.base_url))) as response:
                    assert await read_whole(response, 1000) == b"x" * 1000
            assert fake.connections == 1
            fake.default = stalls("x" * 1000)
            async with aclosing(await send(client, client.build_request("GET", fake.base_url))) as response:
                with pytest.raises(TooLarge, match="999 bytes"):
                    await read_whole(response, 999)
            await fake.wait_connections(0)
        nursery.cancel_scope.cancel()


async def test_leaving_in_the_middle_closes_the_connection() -> None:
    async with trio.open_nursery() as nursery, httpx2.AsyncClient(trust_env=False) as client:
        fake = await serve_fake_model(nursery)
        fake.default = stalls("half")
        with trio.fail_after(5):
            async with aclosing(await send(client, client.build_request("GET", fake.base_url))) as response:
                with trio.move_on_after(0.05):
                    await read_whole(response, 1000)
            await fake.wait_connections(0)
        nursery.cancel_scope.cancel()
