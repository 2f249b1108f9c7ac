"""``hector serve`` and ``hector check``: from flags, environment and file to settings, and the start of the server."""

from __future__ import annotations

import gc
import os
import sys
from typing import TYPE_CHECKING, Any

import click

from hector_trio.cli import FAILED, complain, forget_stdout, hector, say

if TYPE_CHECKING:
    from hector_trio.config import Settings
    from hector_trio.server import Serving

MODEL = "command-line"
"""The name under ``llms`` of the model that ``--provider`` declares: it inherits nothing from the config's models."""


@hector.command(name="serve")
@click.option("--config", metavar="FILE", envvar="HECTOR_CONFIG", help="Configuration; flags override it.")
@click.option("--host", metavar="HOST", multiple=True, help="Address to listen on; may be repeated.")
@click.option("--port", type=click.IntRange(0, 65535), help="TCP port; 0: any free one.")
@click.option("--uds", metavar="PATH", help="Listen on a Unix socket instead.")
@click.option("--fd", type=click.IntRange(0), help="Listen on an inherited socket instead.")
@click.option("--tls-cert", metavar="FILE", help="Certificate chain (PEM): serve https and wss.")
@click.option("--tls-key", metavar="FILE", help="Private key (PEM).")
@click.option("--root-path", metavar="PREFIX", help="Prefix under which a proxy publishes this server.")
@click.option("--public-url", metavar="URL", help="Public address of this server, for agent cards.")
@click.option("--trusted-proxies", metavar="CIDR,…", multiple=True, help="Proxies whose X-Forwarded-* count.")
@click.option("--allow-origin", metavar="URL", multiple=True, help="Origin of browser pages that may call.")
@click.option("--allowed-host", metavar="HOST", multiple=True, help="Host name accepted besides loopback names.")
@click.option("--insecure", is_flag=True, default=None, help="Let others reach it without any token.")
@click.option("--shutdown-grace", metavar="S", type=click.FloatRange(0), help="Seconds that streams may go on.")
@click.option("--store", metavar="PATH|memory", help="Where sessions, tasks and their logs are kept.")
@click.option("--durability", type=click.Choice(["process", "full"]), help="What acknowledged data survives.")
@click.option("--access-log/--no-access-log", default=None, help="One log line per request.")
@click.option("--log-level", type=click.Choice(["debug", "info", "warning", "error"]))
@click.option("--log-format", type=click.Choice(["auto", "text", "json"]))
@click.option("--provider", type=click.Choice(["demo", "openai"]), help="The model of the agent `assistant`.")
@click.option("--model", metavar="NAME", help="With --provider openai: the model's name.")
@click.option("--base-url", metavar="URL", help="With --provider openai: the API of any server that speaks it.")
def command(config: str | None, **given: Any) -> None:
    """Serve agents until Ctrl-C or SIGTERM.

    Without a configuration it serves the agent `assistant` on the built-in demo model, which needs no key and no
    network. `--provider openai` lets it answer with a real model instead; the key is taken from OPENAI_API_KEY.
    HECTOR_* variables override defaults, the configuration overrides them, flags override all.
    """
    gc.disable()  # looking for what imports leave behind, next to nothing, takes a tenth of the time of a start
    settings = _load_for(given, config)
    _import_structlog()
    from hector_trio.server import configure_logs, run

    configure_logs(settings)
    gc.enable()
    run(settings, started=lambda serving: _announce(settings, serving, asked=given["provider"] is not None))


def _import_structlog() -> None:
    """Without rich, which structlog imports where it can, for a tenth of the start: for tracebacks that show the values
    of variables, which no server may print."""
    if "rich" not in sys.modules:
        sys.modules["rich"] = None  # type: ignore[assignment]  # as if it were not installed
        try:
            import structlog  # noqa: F401
        finally:
            del sys.modules["rich"]


@hector.command(name="check")
@click.argument("config")
def check(config: str) -> None:
    """Say what is wrong with a configuration, as `serve` would, without serving."""
    from hector_trio.config import LlmAgent, PythonAgent, check_exposure, from_environment, variables_in
    from hector_trio.config.reading import read_file
    from hector_trio.errors import HectorError
    from hector_trio.server import load_function, tls_context

    for warning in from_environment(os.environ, variables_in(read_file(config))).warnings:
        say(f"warning: {warning}")
    settings = _load(config, {})
    wrong = 0
    checks: list[Any] = [lambda: check_exposure(settings), lambda: tls_context(settings.server)]
    for agent_id, agent in settings.agents.items():
        if isinstance(agent, PythonAgent):
            where = f"{config}: agents.{agent_id}.function"
            checks.append(lambda reference=agent.function, where=where: load_function(reference, where))
    for each in checks:
        try:
            each()
        except HectorError as error:
            complain(error)
            wrong += 1
    if wrong:
        raise SystemExit(FAILED)
    agents = ", ".join(
        f"{agent_id} ({agent.llm if isinstance(agent, LlmAgent) else 'python'})"
        for agent_id, agent in settings.agents.items()
    )
    llms = ", ".join(f"{name} ({_kind(llm)})" for name, llm in settings.llms.items())
    click.echo(f"{config}: ok; agents: {agents}; llms: {llms}")


def _kind(llm: Any) -> str:
    return str(llm.__struct_config__.tag)


def _load(config: str | None, flags: dict[str, Any]) -> Settings:
    from hector_trio.config import default_settings, load_file

    return default_settings(os.environ, flags) if config is None else load_file(config, os.environ, flags)


def _load_for(given: dict[str, Any], config: str | None) -> Settings:
    from hector_trio.errors import ConfigError

    try:
        return _load(config, _flags(given))
    except ConfigError as error:
        # The other half may stand in the file or in a variable, so only now it is known to be missing.
        for there, missing in (("cert", "key"), ("key", "cert")):
            if given[f"tls_{there}"] and not given[f"tls_{missing}"] and f"server.tls.{missing}: is " in error.detail:
                raise click.UsageError(f"--tls-{there} needs --tls-{missing} FILE") from None
        raise


def _flags(given: dict[str, Any]) -> dict[str, Any]:
    """The flags, shaped like the settings; what was not given is None or empty and overrides nothing."""
    proxies = [part.strip() for each in given["trusted_proxies"] for part in each.split(",") if part.strip()]
    flags: dict[str, Any] = {
        "server": {
            **{key: given[key] for key in ("host", "port", "uds", "fd", "root_path", "insecure", "shutdown_grace")},
            "tls": {"cert": given["tls_cert"], "key": given["tls_key"]},
            "base_url": given["public_url"],
            "trusted_proxies": proxies,
            "allow_origins": given["allow_origin"],
            "allowed_hosts": given["allowed_host"],
        },
        "store": {"url": given["store"], "durability": given["durability"]},
        "log": {"level": given["log_level"], "format": given["log_format"], "access": given["access_log"]},
    }
    model = _model(given["provider"], given["model"], given["base_url"])
    if model is not None:
        flags["llms"] = {MODEL: model}
        flags["agents"] = {"assistant": {"type": "llm", "llm": MODEL}}
    return flags


def _model(provider: str | None, model: str | None, base_url: str | None) -> dict[str, Any] | None:
    """The model that the flags declare."""
    if provider != "openai":
        for name, value in (("--model", model), ("--base-url", base_url)):
            if value is not None:
                raise click.UsageError(f"{name} goes with --provider openai")
        return None if provider is None else {"type": "demo"}
    if not model:
        raise click.UsageError("--provider openai needs --model NAME: the model that shall answer")
    key = os.environ.get("OPENAI_API_KEY") or None
    if key is None and base_url is None:
        from hector_trio.errors import ConfigError

        raise ConfigError("--provider openai: set OPENAI_API_KEY, or name a server without one by --base-url URL")
    return {"type": "openai", "model": model, "base_url": base_url, "api_key": key}


def _announce(settings: Settings, serving: Serving, *, asked: bool) -> None:
    from hector_trio.config import OpenAiLlm
    from hector_trio.server import announcement

    text = announcement(settings, serving)
    real = any(isinstance(llm, OpenAiLlm) for llm in settings.llms.values())
    if os.environ.get("OPENAI_API_KEY") and not asked and not real:
        text += (
            "\nOPENAI_API_KEY is set. To answer with a real model:\n  hector serve --provider openai --model MODEL\n"
        )
    try:
        click.echo(text)
    except OSError:
        forget_stdout()  # whoever started us does not listen; that is no reason not to serve
