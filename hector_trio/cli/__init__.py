"""The command line ``hector``: the group of commands, its exit codes, and what the commands share."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeGuard, TypeVar

import click

# Only click is imported at the top of this package's modules: `hector --help` must not wait for a server's imports,
# nor a command for the others.

if TYPE_CHECKING:
    from hector_trio.client import Client

F = TypeVar("F", bound=Callable[..., Any])

DEFAULT_SERVER = "http://127.0.0.1:8080"

OK = 0
FAILED = 1
USAGE = 2
UNREACHABLE = 3
NOT_FOUND = 4
ASKS = 5
INTERRUPTED = 130
BROKEN_PIPE = 141

EXIT_CODES = f"""\b
Exit codes:
  {OK:<4} done
  {FAILED:<4} refused or failed: the request, the task, or the start of the server
  {USAGE:<4} wrong usage
  {UNREACHABLE:<4} the server cannot be reached, or the connection to it was lost
  {NOT_FOUND:<4} no such agent, session or task
  {ASKS:<4} the task asks something, and stdin is no terminal to answer on
  {INTERRUPTED:<4} interrupted with Ctrl-C
"""


COMMANDS = {
    "call": ("calls", "Have an agent answer one prompt."),
    "chat": ("chat", "Talk with an agent, line by line."),
    "check": ("serve", "Say what is wrong with a configuration."),
    "info": ("calls", "Show the card of an agent."),
    "list": ("calls", "List the agents of a server."),
    "serve": ("serve", "Serve agents until Ctrl-C or SIGTERM."),
    "sessions": ("sessions", "List, show, create and delete conversations."),
    "tree": ("tree", "Show what lives in a server."),
    "version": ("", "Print the version."),
}
"""The module of every command, which is imported when the command is used, and what the help says of it."""


class Commands(click.Group):
    """The group of all commands: whatever goes wrong in one ends as one line on stderr and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        home, _ = COMMANDS.get(cmd_name, ("", ""))
        if home:
            import_module(f"{__name__}.{home}")
        return super().get_command(ctx, cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, says) for name, (_, says) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            result = super().invoke(ctx)
            if sys.stdout is not None:
                sys.stdout.flush()
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except (Exception, KeyboardInterrupt, BaseExceptionGroup) as error:
            code = explain(error)
            if code is None:
                raise
            raise SystemExit(code) from None
        return result


def explain(error: BaseException) -> int | None:
    """Says on stderr what an expected error is, and gives the exit code for it; None for a bug."""
    from hector_trio.errors import HectorError

    leaves = list(_leaves(error))
    for leaf in leaves:
        if isinstance(leaf, KeyboardInterrupt):
            return INTERRUPTED
        if not isinstance(leaf, HectorError | BrokenPipeError) and not _is_full(leaf):
            return None
    if any(isinstance(leaf, BrokenPipeError) for leaf in leaves):
        forget_stdout()
        return BROKEN_PIPE
    full = next((leaf for leaf in leaves if _is_full(leaf)), None)
    if full is not None:
        forget_stdout()
        say(f"the output cannot be written: {full.strerror}")
        return FAILED
    first = leaves[0]
    assert isinstance(first, HectorError)
    complain(first)
    return exit_code(first)


def _is_full(error: BaseException) -> TypeGuard[OSError]:
    """Whether what we write to takes no more. The commands write nothing but their output, the server has its own."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from _leaves(each)
    else:
        yield error


def complain(error: BaseException) -> None:
    """One line on stderr for each thing that is wrong."""
    from hector_trio.errors import HectorError

    if not isinstance(error, HectorError):
        say(str(error))
        return
    for line in error.detail.splitlines() or [error.title]:
        say(line)
    for each in error.errors:
        if each.message not in error.detail:  # ours holds all of them; another server's may not
            say(f"{each.pointer or '/'}: {each.message}")


def say(line: str) -> None:
    """A line for people, on stderr."""
    click.echo(f"hector: {line}", err=True)


def exit_code(error: BaseException) -> int:
    from hector_trio.errors import HectorError, NotFound

    if isinstance(error, NotFound):
        return NOT_FOUND
    if isinstance(error, HectorError) and error.code == "connection_failed":
        return UNREACHABLE
    return FAILED


def forget_stdout() -> None:
    """Nobody reads our output any more: lets what is buffered vanish, so that the end of the process does not fail."""
    if sys.stdout is not None:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, sys.stdout.fileno())
        os.close(null)


class Target:
    """The server the client commands talk to, as the flags say, and how they answer."""

    def __init__(self) -> None:
        self.server: str | None = None
        self.token: str | None = None
        self.json = False

    def a2a(self, text: str) -> str | None:
        """The address of the A2A agent that AGENT names: any URL but that of an agent of a server like this one."""
        if not text.startswith(("http://", "https://")):
            return None
        place = text.partition("?")[0].partition("#")[0].rstrip("/")
        before, found, agent_id = place.rpartition("/agents/")
        if found and agent_id and "/" not in agent_id and before:
            return None
        if self.server is not None:
            raise click.UsageError(f"--server goes with an agent's id, not with {text}")
        return text

    def agent(self, text: str) -> str:
        """The agent that AGENT names; an ``http(s)`` URL names its server as well."""
        if not text.startswith(("http://", "https://")):
            return text
        server, found, agent_id = text.partition("?")[0].partition("#")[0].rstrip("/").rpartition("/agents/")
        if not found or not agent_id or "/" in agent_id:
            raise click.BadParameter(f"{text!r} is no agent's URL, such as {DEFAULT_SERVER}/agents/assistant")
        if self.server is not None and self.server.rstrip("/") != server:
            raise click.UsageError(f"--server {self.server} and the agent's URL {text} name different servers")
        self.server = server
        return agent_id

    def open(self) -> Client:
        """Raises: click.UsageError for an address or a token that cannot be one."""
        from hector_trio.client import Client
        from hector_trio.errors import InvalidRequest

        server = self.server or os.environ.get("HECTOR_SERVER") or DEFAULT_SERVER
        try:
            return Client(server, token=self.token or os.environ.get("HECTOR_TOKEN") or None)
        except InvalidRequest as error:
            raise click.UsageError(error.detail) from None


def target() -> Target:
    found = click.get_current_context().find_root().ensure_object(Target)
    assert isinstance(found, Target)
    return found


def _remember(ctx: click.Context, parameter: click.Parameter, value: Any) -> None:
    if value:
        assert parameter.name is not None
        setattr(ctx.find_root().ensure_object(Target), parameter.name, value)


def connected(command: F) -> F:
    """Adds the flags that every client command takes, and that may stand before its name as well as after it."""
    for option in (
        click.option("--json", is_flag=True, expose_value=False, callback=_remember, help="Answer in JSON."),
        click.option(
            "--token", metavar="T", expose_value=False, callback=_remember, help="Bearer token, or HECTOR_TOKEN."
        ),
        click.option(
            "--server",
            metavar="URL",
            expose_value=False,
            callback=_remember,
            help=f"The server, or HECTOR_SERVER.  [default: {DEFAULT_SERVER}]",
        ),
    ):
        command = option(command)
    return command


def _print_version(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        from hector_trio import __version__

        click.echo(f"hector_trio {__version__}")
        ctx.exit()


@click.group(cls=Commands, epilog=EXIT_CODES, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print the version."
)
@connected
def hector() -> None:
    """Serve agents, and talk to agents that are served.

    AGENT is an agent's id, or its URL (http://host:port/agents/assistant), which names the server as well. For info,
    call and chat it may also be the URL of any A2A agent, of any server. Flags may stand anywhere.
    """


@hector.command()
def version() -> None:
    """Print the version."""
    from hector_trio import __version__

    click.echo(f"hector_trio {__version__}")


def _fill_standard_streams() -> None:
    """Opens /dev/null where stdin, stdout or stderr was closed, so that no socket or database gets their numbers."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is taken, and those below are open by now.
            os.open(os.devnull, os.O_RDWR)


def main() -> None:
    """``hector``. Ends the process."""
    _fill_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that lacks a character is no reason to fail
    try:
        hector.main(prog_name="hector")
    except OSError as error:  # from the help or the version, which are printed before any command is invoked
        code = explain(error)
        if code is None:
            raise
        raise SystemExit(code) from None
