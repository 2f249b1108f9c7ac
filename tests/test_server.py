"""Listening, loading and opening: what is refused and why, what is announced, and that an end leaves nothing behind."""

from __future__ import annotations

import fcntl
import os
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trustme

from hector_trio import __version__
from hector_trio.agents import Context
from hector_trio.client import Client
from hector_trio.config import AgentSettings, PythonAgent, Server, Settings, Tls, Token
from hector_trio.errors import ConfigError, StartError
from hector_trio.server import Serving, announcement, listen, load_function, serve, tls_context
from tests import HANG
from tests.engines import Steered, agent, read_all, store_of
from tests.serving import serving, settings_of
from tests.sockets import connected


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")


def close(sockets: list[socket.socket]) -> None:
    for sock in sockets:
        sock.close()


# --- TCP --------------------------------------------------------------------------------------------------------------


@needs_ipv6
def test_both_loopback_addresses_have_the_same_port_also_when_any_will_do() -> None:
    sockets = listen(Server(port=0))
    try:
        assert [sock.getsockname()[0] for sock in sockets] == ["127.0.0.1", "::1"]
        assert len({sock.getsockname()[1] for sock in sockets}) == 1
        for sock in sockets:
            socket.create_connection(sock.getsockname()[:2], timeout=5).close()
    finally:
        close(sockets)


@needs_ipv6
def test_all_addresses_of_both_families_can_be_listened_on_at_once() -> None:
    sockets = listen(Server(host=["0.0.0.0", "::"], port=0))
    try:
        port = sockets[0].getsockname()[1]
        for host in ("127.0.0.1", "::1"):
            socket.create_connection((host, port), timeout=5).close()
    finally:
        close(sockets)


def test_a_port_in_use_is_refused_with_who_has_it() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(StartError, match=rf"Port {port} on 127\.0\.0\.1 is in use by process {os.getpid()} \("):
            listen(Server(host=["127.0.0.1"], port=port))


@needs_ipv6
def test_a_refusal_of_the_second_address_frees_the_first() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(StartError, match=f"Port {port} on ::1 is in use"):
            listen(Server(host=["127.0.0.1", "::1"], port=port))
        socket.create_server(("127.0.0.1", port)).close()


def test_a_port_that_was_just_left_can_be_listened_on_again() -> None:
    (first,) = listen(Server(host=["127.0.0.1"], port=0))
    port = first.getsockname()[1]
    with first, socket.create_connection(("127.0.0.1", port), timeout=5):
        first.setblocking(True)
        first.accept()[0].close()
    close(listen(Server(host=["127.0.0.1"], port=port)))


def test_an_address_that_is_not_of_this_machine_is_named() -> None:
    with pytest.raises(StartError, match=r"Cannot listen on 192\.0\.2\.1 port 0: "):
        listen(Server(host=["192.0.2.1"], port=0))


# --- Unix sockets and inherited ones ----------------------------------------------------------------------------------


def test_a_unix_socket_left_behind_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    (sock,) = listen(Server(uds=path))
    with sock, socket.socket(socket.AF_UNIX) as client:
        client.connect(path)


def test_a_unix_socket_on_which_somebody_listens_is_refused_and_goes_on(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    (sock,) = listen(Server(uds=path))
    with sock:
        with pytest.raises(StartError, match=f"--uds {path}: another process listens there"):
            listen(Server(uds=path))
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_what_is_not_a_socket_is_refused_and_kept(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "s"
    if kind == "file":
        path.write_text("precious")
    else:
        path.mkdir()
    with pytest.raises(StartError, match="exists and is not a socket"):
        listen(Server(uds=str(path)))
    assert path.exists()


def test_a_folder_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(StartError, match=r"Cannot listen on .*/none/s: No such file"):
        listen(Server(uds=str(tmp_path / "none" / "s")))


def test_an_inherited_socket_is_taken_as_it_is() -> None:
    with socket.create_server(("127.0.0.1", 0)) as inherited:
        name = inherited.getsockname()
        (sock,) = listen(Server(fd=inherited.detach()))
        with sock:
            assert sock.getsockname() == name
            socket.create_connection(name, timeout=5).close()


def test_a_number_that_is_no_socket_is_refused() -> None:
    with open(os.devnull) as file, pytest.raises(StartError, match=f"--fd {file.fileno()}: not a socket"):
        listen(Server(fd=file.fileno()))
    with pytest.raises(StartError, match="--fd 65535: not a socket"):
        listen(Server(fd=65535))


# --- TLS --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    authority = trustme.CA()
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    for name in ("a", "b"):
        made = authority.issue_cert("localhost", "127.0.0.1")
        made.private_key_pem.write_to_path(str(folder / f"{name}.key"))
        made.cert_chain_pems[0].write_to_path(str(folder / f"{name}.pem"))
    (folder / "empty").write_text("")
    return folder


def test_without_tls_there_is_no_context() -> None:
    assert tls_context(Server()) is None


def test_a_context_takes_nothing_older_than_tls_1_2(certificates: Path) -> None:
    context = tls_context(Server(tls=Tls(str(certificates / "a.pem"), str(certificates / "a.key"))))
    assert context is not None
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2


@pytest.mark.parametrize(
    ("cert", "key"), [("none", "a.key"), ("a.pem", "none"), ("a.pem", "b.key"), ("empty", "a.key")]
)
def test_a_certificate_that_cannot_be_used_is_named_with_its_key(certificates: Path, cert: str, key: str) -> None:
    with pytest.raises(StartError, match=rf"server\.tls: cannot use \S+{cert} with \S+{key}: ."):
        tls_context(Server(tls=Tls(str(certificates / cert), str(certificates / key))))


async def test_https_is_announced_and_served(certificates: Path) -> None:
    tls = Tls(str(certificates / "a.pem"), str(certificates / "a.key"))
    async with serving(settings_of(server={"tls": tls})) as server:
        assert server.url.startswith("https://127.0.0.1:")
        trusted = ssl.create_default_context(cafile=str(certificates / "ca.pem"))
        async with server.client(verify=trusted) as client:
            assert (await client.get("/health/live")).status_code == 200


# --- functions --------------------------------------------------------------------------------------------------------

CODE = "async def good(ctx): await ctx.emit_text('from a file')\nnothing = 5\n"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of Python code from which modules can be imported."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "agents_of_a_test.py").write_text(CODE)
    (tmp_path / "broken_of_a_test.py").write_text("import no_such_module_anywhere\n")
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.endswith("_of_a_test"):
            del sys.modules[name]


@pytest.mark.parametrize("place", ["agents_of_a_test", "{}/agents_of_a_test.py"])
def test_a_function_is_loaded_from_a_module_or_a_file(folder: Path, place: str) -> None:
    assert load_function(f"{place.format(folder)}:good", "agents.a.function").__name__ == "good"


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("agents_of_a_test:missing", "AttributeError"),
        ("agents_of_a_test:nothing", "is not a function"),
        ("no_such_module_anywhere:f", "ModuleNotFoundError"),
        ("broken_of_a_test:f", "no_such_module_anywhere"),
        ("{}/none.py:f", "FileNotFoundError"),
        ("agents_of_a_test", "cannot load"),
        (":good", "cannot load"),
    ],
)
def test_a_function_that_cannot_be_loaded_is_named_with_where_it_stands(
    folder: Path, reference: str, said: str
) -> None:
    reference = reference.format(folder)
    with pytest.raises(ConfigError) as raised:
        load_function(reference, "c.yaml: agents.a.function")
    assert raised.value.detail.startswith("c.yaml: agents.a.function: ")
    assert repr(reference) in raised.value.detail
    assert said in raised.value.detail


async def test_an_agent_of_the_configuration_runs_its_function(folder: Path) -> None:
    settings = settings_of(agents={"a": PythonAgent(function=f"{folder}/agents_of_a_test.py:good")})
    async with serving(settings) as server, Client(server.url) as client:
        task = await client.run("a", "x")
        assert task.output
        assert task.output.content == "from a file"


# --- the announcement -------------------------------------------------------------------------------------------------


async def announced(settings: Settings, **agents: Any) -> str:
    async with serving(settings, agents or None) as server:
        return announcement(settings, Serving([server.url], server.services))


async def test_the_announcement_names_version_address_agents_and_data_and_ends_with_a_line_to_paste() -> None:
    settings = settings_of()
    async with serving(settings, agent(Steered())) as server:
        text = announcement(settings, Serving([server.url, "http://[::1]:5"], server.services))
        lines = text.splitlines()
        assert lines[0] == f"hector_trio {__version__}"
        for line in (
            f"  listening  {server.url}",
            "  listening  http://[::1]:5",
            "  agent      assistant  The demo model",
            "  agent      a",
            "  data       memory only",
        ):
            assert line in lines
        assert f"{server.url}/agents/assistant/tasks" in lines[-1]
        assert "Authorization" not in text
        done = await trio.run_process(["sh", "-c", lines[-1]], capture_stdout=True, capture_stderr=True)
        assert b'"final":true' in done.stdout


async def test_the_line_to_paste_asks_the_default_agent_or_else_the_first() -> None:
    both: dict[str, AgentSettings] = {
        name: PythonAgent(function="tests.test_server:nothing") for name in ("first", "second")
    }
    settings = msgspec.structs.replace(settings_of(), agents=both)
    assert "/agents/first/tasks" in (await announced(settings)).splitlines()[-1]
    settings = msgspec.structs.replace(settings, default_agent="second")
    assert "/agents/second/tasks" in (await announced(settings)).splitlines()[-1]


async def nothing(ctx: Context) -> None:
    """An agent of these tests."""


async def test_with_tokens_the_line_to_paste_has_a_place_for_one_and_shows_none() -> None:
    text = await announced(settings_of(auth={"tokens": [Token("a", "secret-0123456789abcdef")]}))
    assert "Authorization: Bearer TOKEN" in text
    assert "secret" not in text


async def test_the_data_are_told_by_their_absolute_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = await announced(settings_of(store={"url": "data/hector.db"}))
    assert f"  data       {tmp_path}/data/hector.db" in text.splitlines()


async def test_on_a_unix_socket_the_line_to_paste_works_too(tmp_path: Path) -> None:
    path = tmp_path / "s"
    settings = settings_of(server={"uds": str(path)})
    async with serving(settings) as server:
        assert server.url == f"unix:{path}"
        line = announcement(settings, Serving([server.url], server.services)).splitlines()[-1]
        done = await trio.run_process(["sh", "-c", line], capture_stdout=True, capture_stderr=True)
        assert b'"final":true' in done.stdout
    assert not path.exists()


async def test_a_prefix_stands_in_every_address() -> None:
    async with serving(settings_of(server={"root_path": "/hector"})) as server:
        assert server.url.endswith("/hector")
        async with server.client() as client:
            assert (await client.get("/agents")).status_code == 200


# --- the end ----------------------------------------------------------------------------------------------------------


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def own_threads() -> set[str]:
    """Without Trio's, which wait for further work a while."""
    return {thread.name for thread in threading.enumerate() if not thread.name.startswith("Trio")}


def is_free(store: Path) -> bool:
    """Whether nobody holds the store."""
    with open(f"{store}.lock") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


async def test_cancelled_from_outside_it_ends_at_once_with_its_final_chunks_committed(tmp_path: Path) -> None:
    path = tmp_path / "hector.db"
    steered = Steered()
    settings = settings_of(store={"url": str(path)})
    with trio.fail_after(20):
        async with serving(settings, agent(steered)) as server:
            async with connected(server, "a") as peer, Client(server.url) as client:
                await peer.ask("streamed", taskId="streamed")
                await client.submit("a", "kept", task_id="kept")
                await steered.wait_started("streamed")
                await steered.wait_started("kept")
                assert not is_free(path)
    assert sorted(steered.ended) == ["kept", "streamed"]
    assert is_free(path)
    async with store_of("sql", tmp_path) as store:
        for task_id in ("streamed", "kept"):
            row = await store.get_task("local", "a", task_id)
            assert row is not None
            assert row.ended
            segments = await store.read_log(row.key, 0, 1 << 20)
            assert segments[-1].last_seq == row.last_seq
            assert b'"final":true' in segments[-1].data


async def test_stopped_it_drains_and_the_address_is_free() -> None:
    steered = Steered()
    with trio.fail_after(10):
        async with serving(settings_of(server={"shutdown_grace": 0.1}), agent(steered)) as server:
            async with Client(server.url) as client, client.stream("a", "x") as chunks:
                await anext(chunks)
                server.stop.set()
                last = [chunk async for chunk in chunks][-1]
            assert (last.final, last.status, last.code) == (True, "failed", "interrupted")
            host, port = server.address
    with pytest.raises(OSError, match="all attempts to connect"):
        await trio.open_tcp_stream(host, port)


@pytest.mark.parametrize("fault", ["not a database", "function", "tls", "exposed"])
async def test_a_start_that_fails_leaves_nothing_behind(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "hector.db"
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    sections: dict[str, Any] = {"server": {"port": port}, "store": {"url": str(path)}}
    if fault == "not a database":
        path.write_text("This is no database at all, and never was.")
    elif fault == "function":
        sections["agents"] = {"a": PythonAgent(function="tests.test_server:missing")}
    elif fault == "tls":
        sections["server"]["tls"] = Tls(str(tmp_path / "none.pem"), str(tmp_path / "none.key"))
    else:
        sections["server"]["host"] = ["0.0.0.0"]
    settings = settings_of(**sections)
    await trio.to_thread.run_sync(lambda: None)
    threads, open_files = own_threads(), descriptors()
    tasks = trio.lowlevel.current_statistics().tasks_living
    for _ in range(3):
        with trio.fail_after(5), pytest.raises(StartError):
            await serve(settings)
    assert own_threads() == threads
    assert descriptors() == open_files
    assert trio.lowlevel.current_statistics().tasks_living == tasks
    assert not path.with_name("hector.db.lock").exists() or is_free(path)
    socket.create_server(("127.0.0.1", port)).close()


async def test_a_start_that_fails_removes_its_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "s"
    (tmp_path / "x.db").write_text("This is no database at all, and never was.")
    with pytest.raises(StartError, match="not a database"):
        await serve(settings_of(server={"uds": str(path)}, store={"url": str(tmp_path / "x.db")}))
    assert not path.exists()


async def test_an_inherited_socket_that_others_can_reach_is_refused_without_tokens_and_closed() -> None:
    with socket.create_server(("0.0.0.0", 0)) as inherited:
        number = os.dup(inherited.fileno())
        with pytest.raises(ConfigError, match=r"auth\.tokens"):
            await serve(settings_of(server={"fd": number}))
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(number)


async def test_a_task_that_had_not_begun_waits_for_the_next_start(tmp_path: Path) -> None:
    settings = settings_of(store={"url": str(tmp_path / "hector.db")}, server={"shutdown_grace": 0})
    steered, again = Steered(), Steered()
    with trio.fail_after(20):
        async with serving(settings, agent(steered)) as server, Client(server.url) as client:
            session = await client.create_session("a")
            for text in ("runs", "waits"):
                await client.submit("a", text, task_id=text, session_id=session.session_id)
            await steered.wait_started("runs")
            server.stop.set()
            await steered.wait_ended("runs")
        again.let("waits")
        async with serving(settings, agent(again)) as server:
            await again.wait_ended("waits")
            row = await server.engine.store.get_task("local", "a", "waits")
            assert row is not None
            row = await server.engine.wait(row)
            assert row.status == "completed"
            assert (await read_all(server.engine, row))[-1].final
    assert (steered.started, again.started) == (["runs"], ["waits"])


def test_a_live_socket_of_another_kind_is_not_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "datagrams")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as live:
        live.bind(path)
        with pytest.raises(StartError):
            listen(Server(uds=path))
        assert (tmp_path / "datagrams").exists()


def test_an_inherited_socket_has_to_listen() -> None:
    with socket.socket() as idle, pytest.raises(StartError, match="not a listening"):
        listen(Server(fd=idle.fileno()))


def test_whatever_a_users_file_does_is_one_error(tmp_path: Path) -> None:
    for number, text in enumerate(("def broken(:", "raise KeyError('x')", "raise SystemExit(3)", "undefined")):
        file = tmp_path / f"agent{number}.py"
        file.write_text(text)
        with pytest.raises(ConfigError, match="cannot load"):
            load_function(f"{file}:agent", "agents.a.function")


@pytest.mark.parametrize(
    ("before", "meanwhile", "after"),
    [
        ("pass", "True True 5000 True", "True False 700 True"),
        ("gc.disable()", "False False 700 True", "False False 700 True"),
        ("gc.freeze()", "True True 5000 True", "True True 700 True"),
    ],
)
async def test_a_program_that_runs_a_server_finds_its_interpreter_as_it_was(
    before: str, meanwhile: str, after: str
) -> None:
    program = f"""
import gc, os, signal, sys
from hector_trio.config import default_settings
from hector_trio.server import run
{before}
interval = sys.getswitchinterval()
def tell(changed):
    found = gc.isenabled(), gc.get_freeze_count() > 10_000, gc.get_threshold()[0]
    print(*found, (sys.getswitchinterval() != interval) == changed, flush=True)
def started(serving):
    tell(True)
    os.kill(os.getpid(), signal.SIGTERM)
flags = {{"server": {{"host": ["127.0.0.1"], "port": 0}}, "store": {{"url": "memory"}}}}
run(default_settings({{}}, flags), started=started)
tell(False)
"""
    with trio.fail_after(HANG):
        done = await trio.run_process([sys.executable, "-c", program], capture_stdout=True, capture_stderr=True)
    told = [line for line in done.stdout.decode().splitlines() if line.startswith(("True", "False"))]
    assert told == [meanwhile, after]
