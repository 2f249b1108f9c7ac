"""What an inbox takes and hands on, and where errors end."""

import pytest
import trio

from hector_trio.connection import Inbox, contain


def test_containing_a_group_logs_its_errors_and_raises_its_cancel(caplog: pytest.LogCaptureFixture) -> None:
    class Stop(KeyboardInterrupt):
        pass

    with pytest.raises(BaseExceptionGroup) as raised:
        contain(BaseExceptionGroup("both", [ValueError("kept"), Stop()]), "what happened")
    assert raised.group_contains(Stop)
    assert not raised.group_contains(ValueError)
    assert "what happened" in caplog.text
    assert "ValueError: kept" in caplog.text


async def test_an_inbox_hands_on_in_order_and_refuses_beyond_its_limits() -> None:
    inbox: Inbox[str] = Inbox(3, 10)
    assert inbox.put("a", 4)
    assert not inbox.put("too big", 7)
    assert inbox.put("b", 6)
    assert inbox.put("c")
    assert not inbox.put("too many")
    inbox.close("end")
    inbox.close("ignored")
    assert not inbox.put("too late")
    with trio.fail_after(5):
        assert [await inbox.receive() for _ in range(5)] == ["a", "b", "c", "end", "end"]


async def test_a_cancelled_receive_takes_nothing() -> None:
    inbox: Inbox[str] = Inbox(3, 10)
    inbox.put("a")
    with trio.CancelScope() as scope:
        scope.cancel()
        await inbox.receive()
    assert scope.cancelled_caught
    with trio.fail_after(5):
        assert await inbox.receive() == "a"
