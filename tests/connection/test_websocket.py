"""What a WebSocket takes from its client and tells it, and how it closes."""

import errno
import socket
import struct
import zlib
from contextlib import suppress
from typing import Any

import pytest
import trio

from hector_trio.connection import ConnectionLimits, statistics
from hector_trio.frames import REASONS
from tests.connection.applications import BLOCK, Told, echo, linux, listener
from tests.hostile import (
    FRAMES,
    accept,
    asgi,
    client_close,
    client_frame,
    forget_peak,
    pause,
    peak_bytes,
    running,
    upgrade,
)


async def test_what_a_client_sends_before_the_101_is_delivered_after_it() -> None:
    early = client_frame(0x81, b"one") + client_frame(0x82, b"two") + client_frame(0x81, b"three")[:4]
    async with running(asgi(websocket=echo)) as server, server.peer(upgrade() + early) as peer:
        with trio.fail_after(5):
            assert await peer.status() == 101
            assert await peer.frame() == (0x81, b"one")
            assert await peer.frame() == (0x82, b"two")
            await peer.send(client_frame(0x81, b"three")[4:])
            assert await peer.frame() == (0x81, b"three")


@pytest.mark.parametrize("early", [100, 1000])
async def test_what_comes_while_early_messages_are_taken_stays_behind_them(early: int) -> None:
    """Also when what came early ends in the middle of a frame."""
    texts = [str(number) for number in range(early + 20)]
    packed = [client_frame(0x81, text.encode()) for text in texts]
    first, rest = b"".join(packed[:early])[:-3], b"".join(packed[:early])[-3:] + b"".join(packed[early:])
    got: list[str] = []
    ended = trio.Event()

    async def collect(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        while len(scope["extensions"]["hector.send_many"]._early) < len(first):
            await pause(0.001)
        await peer.send(rest)  # on its way while what came before is taken
        await send({"type": "websocket.accept", "subprotocol": None, "headers": []})
        while len(got) < len(texts) and (event := await receive())["type"] == "websocket.receive":
            got.append(event["text"])
        ended.set()

    limits = ConnectionLimits(max_unread_messages=2000)
    async with running(asgi(websocket=collect), limits) as server, server.peer(upgrade()) as peer:
        with trio.fail_after(5):
            await peer.send(first)
            await ended.wait()
    assert got == texts


@pytest.mark.parametrize("leave", ["fin", "rst", "close frame"])
async def test_a_client_that_leaves_is_told_to_the_application(leave: str) -> None:
    told = Told()
    async with running(listener(told)) as server, server.websocket() as peer:
        with trio.fail_after(5):
            await told.started.wait()
            if leave == "fin":
                await peer.stream.aclose()
            elif leave == "rst":
                peer.reset()
            else:
                await peer.send(client_close(4321, b"bye"))
                assert await peer.frame() == (0x88, struct.pack("!H", 4321) + b"bye")
                assert await peer.rest() == b""
            await told.ended.wait()
    code, reason = (4321, "bye") if leave == "close frame" else (1006, "")
    assert told.events[-1] == {"type": "websocket.disconnect", "code": code, "reason": reason}


async def test_a_close_frame_without_a_code_is_answered_without_one() -> None:
    told = Told()
    async with running(listener(told)) as server, server.websocket() as peer:
        with trio.fail_after(5):
            await peer.send(client_frame(0x88))
            assert await peer.frame() == (0x88, b"")
            await told.ended.wait()
    assert told.events[-1]["code"] == 1005


async def test_our_close_frame_waits_for_the_clients_and_then_the_connection_ends() -> None:
    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        await send({"type": "websocket.close", "code": 4000, "reason": "enough"})

    limits = ConnectionLimits(linger_timeout=0.3)
    async with running(asgi(websocket=websocket), limits) as server, server.websocket() as peer:
        with trio.fail_after(5):
            assert await peer.frame() == (0x88, struct.pack("!H", 4000) + b"enough")
            await peer.send(client_frame(0x81, b"crossing") + client_close(4000))
            assert await peer.rest() == b""
            await server.until_open(0)


async def test_a_client_that_never_answers_our_close_frame_is_left_within_the_linger_timeout() -> None:
    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        await send({"type": "websocket.close"})

    async with running(asgi(websocket=websocket), ConnectionLimits(linger_timeout=0.2)) as server:
        async with server.websocket():
            await server.until_open(0)


@linux
async def test_the_frames_of_one_send_many_leave_in_one_segment() -> None:
    payloads = [b"", b"a" * 125, b"b" * 126, b"c" * 5000]

    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        await receive()
        await scope["extensions"]["hector.send_many"](payloads)
        await scope["extensions"]["hector.send_many"]([b"d" * 70_000], binary=True)
        await receive()

    async with running(asgi(websocket=websocket)) as server, server.websocket() as peer:
        before = peer.segments_received()
        with trio.fail_after(5):
            await peer.send(client_frame(0x81, b"go"))
            first = await peer.frame()
            assert first == (0x81, b"")
            for payload in payloads[1:]:
                assert await peer.frame() == (0x81, payload)
            assert await peer.frame() == (0x82, b"d" * 70_000)
            assert peer.segments_received() - before <= 1 + 70_000 // 32_768 + 1


async def test_send_many_before_the_acceptance_is_an_error() -> None:
    raised = trio.Event()

    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        with pytest.raises(RuntimeError, match="accepted"):
            await scope["extensions"]["hector.send_many"]([b"too early"])
        raised.set()
        await send({"type": "websocket.close"})

    async with running(asgi(websocket=websocket)) as server, server.peer(upgrade()) as peer:
        with trio.fail_after(5):
            assert await peer.status() == 403
            await raised.wait()


@linux
async def test_a_websocket_peer_that_is_silent_for_two_intervals_is_told_4101_and_reset() -> None:
    told = Told()
    before = statistics().reset
    limits = ConnectionLimits(ping_interval=0.1, linger_timeout=0.2)
    async with running(listener(told), limits) as server, server.websocket() as peer:
        with trio.fail_after(5):
            assert await peer.close_code() == 4101
            await told.ended.wait()
            assert told.events[-1]["code"] == 4101
            await server.until_open(0)
            assert statistics().reset == before + 1
            assert peer.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.EPIPE


async def test_a_websocket_peer_that_answers_pings_stays() -> None:
    told = Told()
    async with running(listener(told), ConnectionLimits(ping_interval=0.1)) as server, server.websocket() as peer:
        with trio.fail_after(5):
            for _ in range(8):
                assert await peer.frame() == (0x89, b"")
                await peer.send(client_frame(0x8A))
            assert not told.ended.is_set()


@pytest.mark.parametrize(("number", "size", "code"), [(1000, 1, 1006), (10_000, 1, 1008), (200, 60_000, 1008)])
async def test_unread_messages_hide_no_disconnect_and_are_bounded(number: int, size: int, code: int) -> None:
    go = trio.Event()
    told = Told()

    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        await go.wait()
        await told.listen(receive)

    async with running(asgi(websocket=websocket), ConnectionLimits(linger_timeout=0.2)) as server:
        async with server.websocket() as peer:
            with trio.fail_after(10):
                with suppress(trio.BrokenResourceError):
                    for _ in range(number // 100):
                        await peer.send(client_frame(0x81, b"m" * size) * 100)
                if code == 1008:
                    assert await peer.close_code() == 1008
        assert not told.ended.is_set()
        go.set()
        with trio.fail_after(5):
            await told.ended.wait()
    assert told.events[-1]["code"] == code
    assert len(told.events) <= 1025


async def test_unread_messages_are_bounded_by_their_bytes_not_their_characters() -> None:
    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        await trio.sleep_forever()

    limits = ConnectionLimits(max_unread_bytes=3000, linger_timeout=0.2)
    app = asgi(websocket=websocket)
    async with running(app, limits, graceful_timeout=0.1) as server, server.websocket() as peer:
        with trio.fail_after(5):
            await peer.send(client_frame(0x81, "€".encode() * 10) * 100 + client_frame(0x89, b"full"))
            assert await peer.frame() == (0x8A, b"full")
            await peer.send(client_frame(0x81, b"x"))
            assert await peer.close_code() == 1008


async def test_a_handler_that_reads_takes_any_number_of_messages_in_one_packet() -> None:
    seen: list[str] = []

    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        await accept(receive, send)
        while (event := await receive())["type"] == "websocket.receive":
            seen.append(event["text"])

    async with running(asgi(websocket=websocket)) as server, server.websocket() as peer:
        with trio.fail_after(10):
            await peer.send(b"".join(client_frame(0x81, b"%d" % number) for number in range(6000)))
            await peer.send(client_close(1000))
            assert await peer.close_code() == 1000
    assert seen == [str(number) for number in range(6000)]


@pytest.mark.parametrize(("data", "code"), [row[1:] for row in FRAMES], ids=[row[0] for row in FRAMES])
async def test_a_broken_rule_is_answered_with_its_code_and_the_connection_ends(data: bytes, code: int) -> None:
    told = Told()
    limits = ConnectionLimits(max_message_bytes=65536, linger_timeout=0.1)
    async with running(listener(told), limits) as server, server.websocket() as peer:
        with trio.fail_after(5):
            await peer.send(data)
            first, payload = await peer.frame()
            assert (first, payload) == (0x88, struct.pack("!H", code) + REASONS[code].encode())
            await told.ended.wait()
            assert told.events == [{"type": "websocket.disconnect", "code": code, "reason": REASONS[code]}]
            assert await peer.rest() == b""
        await server.until_open(0)


async def test_a_message_of_exactly_the_limit_is_taken() -> None:
    async with running(asgi(websocket=echo), ConnectionLimits(max_message_bytes=70_000)) as server:
        async with server.websocket() as peer:
            with trio.fail_after(5):
                await peer.send(client_frame(0x82, b"a" * 70_000))
                assert await peer.frame() == (0x82, b"a" * 70_000)
                await peer.send(client_frame(0x01, "ä".encode() * 20_000) + client_frame(0x80, b"b" * 30_000))
                assert await peer.frame() == (0x81, "ä".encode() * 20_000 + b"b" * 30_000)


@linux
async def test_a_peer_that_goes_on_sending_after_1009_is_neither_buffered_nor_endured() -> None:
    forget_peak()
    before = peak_bytes()
    async with running(asgi(websocket=echo), ConnectionLimits(linger_timeout=0.5)) as server:
        async with server.websocket() as peer:
            began = trio.current_time()
            await peer.send(b"\x82\xff" + struct.pack("!Q", 1 << 30) + b"\0\0\0\0")
            with trio.fail_after(10), pytest.raises(trio.BrokenResourceError):
                while True:
                    await peer.send(BLOCK * 4)
            assert trio.current_time() - began < 3
    assert peak_bytes() - before < 32 << 20


async def test_an_empty_message_is_a_message() -> None:
    told = Told()
    async with running(listener(told)) as server, server.websocket() as peer:
        with trio.fail_after(5):
            await peer.send(client_frame(0x82) + client_frame(0x81) + client_close(1000))
            await told.ended.wait()
    assert [(event["bytes"], event["text"]) for event in told.events[:2]] == [(b"", None), (None, "")]


async def test_pings_are_answered_inside_a_fragmented_message() -> None:
    async with running(asgi(websocket=echo)) as server, server.websocket() as peer:
        with trio.fail_after(5):
            await peer.send(client_frame(0x01, b"a") + client_frame(0x89, b"p") + client_frame(0x80, b"b"))
            assert await peer.frame() == (0x8A, b"p")
            assert await peer.frame() == (0x81, b"ab")


async def test_compression_is_refused_unless_configured() -> None:
    offer = b"sec-websocket-extensions: permessage-deflate; client_max_window_bits"
    async with running(asgi(websocket=echo)) as server, server.peer(upgrade(b"/", offer)) as peer:
        with trio.fail_after(5):
            assert b"extensions" not in await peer.until(b"\r\n\r\n")


def deflated(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


async def test_configured_compression_works_in_both_directions_and_around_control_frames() -> None:
    offer = b"sec-websocket-extensions: permessage-deflate"
    async with running(asgi(websocket=echo), ConnectionLimits(compression=True)) as server:
        async with server.peer(upgrade(b"/", offer)) as peer:
            with trio.fail_after(5):
                assert b"permessage-deflate" in await peer.until(b"\r\n\r\n")
                inflate = zlib.decompressobj(wbits=-15)
                await peer.send(client_frame(0x81, b"plain"))
                first, payload = await peer.frame()
                assert (first, inflate.decompress(payload + b"\0\0\xff\xff")) == (0xC1, b"plain")
                data = deflated(b"packed" * 1000)
                await peer.send(client_frame(0x41, data[:5]) + client_frame(0x89, b"p") + client_frame(0x80, data[5:]))
                assert await peer.frame() == (0x8A, b"p")
                first, payload = await peer.frame()
                assert (first, inflate.decompress(payload + b"\0\0\xff\xff")) == (0xC1, b"packed" * 1000)


@linux
async def test_a_deflate_bomb_is_1009_before_it_is_inflated() -> None:
    compressor = zlib.compressobj(wbits=-15)
    bomb = b"".join(compressor.compress(bytes(1 << 20)) for _ in range(256)) + compressor.flush(zlib.Z_SYNC_FLUSH)
    packet = client_frame(0xC2, bomb)
    forget_peak()
    before = peak_bytes()
    async with running(asgi(websocket=echo), ConnectionLimits(compression=True)) as server:
        async with server.peer(upgrade(b"/", b"sec-websocket-extensions: permessage-deflate")) as peer:
            with trio.fail_after(10):
                assert await peer.status() == 101
                await peer.send(packet)
                assert await peer.close_code() == 1009
    assert peak_bytes() - before < 32 << 20


async def test_a_subprotocol_must_have_been_offered() -> None:
    async def websocket(scope: Any, receive: Any, send: Any) -> None:
        wanted = scope["path"][1:]
        await send({"type": "websocket.accept", "subprotocol": wanted, "headers": [(b"x-a", b"b")]})
        await receive()

    offer = b"sec-websocket-protocol: one, two"
    async with running(asgi(websocket=websocket)) as server:
        with trio.fail_after(5):
            async with server.peer(upgrade(b"/two", offer)) as peer:
                head = await peer.until(b"\r\n\r\n")
                assert b"101" in head
                assert b"sec-websocket-protocol: two\r\n" in head
                assert b"x-a: b\r\n" in head
            async with server.peer(upgrade(b"/three", offer)) as peer:
                assert await peer.status() == 500
