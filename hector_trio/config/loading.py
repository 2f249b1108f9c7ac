"""Settings in layers, each overriding the one before, key by key: defaults, ``HECTOR_*``, the file, the command line.

Paths inside a config file (TLS files, the store, the Unix socket, files of Python agents) are relative to the folder
of that file; paths from variables, flags and defaults are relative to the working directory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from hector_trio.config.building import Builder
from hector_trio.config.checks import check_files, check_references, check_together
from hector_trio.config.environment import from_environment
from hector_trio.config.issues import Issues, Path
from hector_trio.config.settings import DemoLlm, LlmAgent, Settings

COMMAND_LINE = "command line"


def load(
    text: str,
    environ: Mapping[str, str],
    *,
    source: str,
    base: str | None = None,
    flags: Mapping[str, Any] | None = None,
    need_agents: bool = True,
) -> Settings:
    """The settings of a config file's ``text`` over ``environ`` and under ``flags`` (shaped like the settings).

    ``source`` names the file in messages; relative paths in the text are joined to the folder ``base`` (None: kept).
    ``need_agents`` is False for programs that bring their own agents. Reads nothing from outside.

    Raises ConfigError: one line ``source: path.of.key: message`` for each thing that is wrong, the first one first.
    """
    from hector_trio.config.reading import Reader  # with PyYAML, which nobody needs who has no file

    issues = Issues(source)
    document = Reader(environ, issues).read(text)
    return _layered(environ, document, flags, issues, base=base, need_agents=need_agents)


def load_file(
    path: str, environ: Mapping[str, str], flags: Mapping[str, Any] | None = None, *, need_agents: bool = True
) -> Settings:
    """The settings of the config file at ``path``; see ``load``. Also looks whether the files it names are there.

    Raises ConfigError.
    """
    from hector_trio.config.reading import read_file

    base = os.path.dirname(os.path.abspath(path))
    settings = load(read_file(path), environ, source=path, base=base, flags=flags, need_agents=need_agents)
    check_files(settings, source=path)
    return settings


def default_settings(
    environ: Mapping[str, str] | None = None, flags: Mapping[str, Any] | None = None, *, need_agents: bool = True
) -> Settings:
    """The settings without a config file: one agent ``assistant``, on the demo model unless ``flags`` declare another.

    Raises ConfigError.
    """
    issues = Issues("settings")
    agents = {"assistant": {"name": "Assistant"}} if need_agents else {}
    settings = _layered(environ or {}, {"agents": agents}, flags, issues, base=None, need_agents=need_agents)
    assistant = settings.agents.get("assistant")
    if not isinstance(assistant, LlmAgent) or assistant.description:
        return settings
    model = settings.llms[assistant.llm]
    said = msgspec.structs.replace(
        assistant,
        description=(
            "A built-in demo without a language model: it streams answers made up by simple rules, to try the server."
            if isinstance(model, DemoLlm)
            else f"Answers with the model {model.model}."
        ),
    )
    return msgspec.structs.replace(settings, agents={**settings.agents, "assistant": said})


def _layered(
    environ: Mapping[str, str],
    document: Any,
    flags: Mapping[str, Any] | None,
    issues: Issues,
    *,
    base: str | None,
    need_agents: bool,
) -> Settings:
    """Defaults < variables < file < flags, completed, checked and built. Raises ConfigError."""
    overrides = from_environment(environ)
    if document is not None and not isinstance(document, dict):
        issues.add((), "a config is a mapping with the keys " + ", ".join(Settings.__struct_fields__))
        issues.raise_any()
    tree: dict[str, Any] = {}
    _put(tree, overrides.values, (), issues.origins, overrides.names.__getitem__)
    _put(tree, document or {}, (), issues.origins, None)
    _put(tree, _given(flags or {}), (), issues.origins, lambda path: COMMAND_LINE)
    _complete(tree, issues)
    settings = Builder(issues, base=base).value(Settings, tree, ())
    check_references(tree, issues, need_agents)
    issues.raise_any()
    assert isinstance(settings, Settings)
    check_together(settings, issues)
    issues.raise_any()
    return settings


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that were given: not None, () or a mapping of nothing but such."""
    given: dict[str, Any] = {}
    for key, value in flags.items():
        kept = _given(value) if isinstance(value, Mapping) else list(value) if isinstance(value, tuple) else value
        if kept is not None and kept not in ([], {}):
            given[key] = kept
    return given


def _put(
    tree: dict[str, Any],
    layer: Mapping[str, Any],
    path: Path,
    origins: dict[Path, str],
    name: Callable[[Path], str] | None,
) -> None:
    """Merges ``layer`` into ``tree``, key by key, and notes in ``origins`` what did not come from the file."""
    for key, value in layer.items():
        here = (*path, key)
        below = tree.get(key)
        if isinstance(value, Mapping):
            # Another kind of model or agent is another thing: it inherits nothing.
            if not isinstance(below, dict) or ("type" in below and value.get("type", below["type"]) != below["type"]):
                below = tree[key] = {}
            _put(below, value, here, origins, name)
            continue
        if value is None and isinstance(below, dict):
            continue  # `limits:` with nothing but comments below it
        tree[key] = value
        for known in [known for known in origins if known[: len(here)] == here]:
            del origins[known]
        if name is not None:
            origins[here] = name(here)


def _complete(tree: dict[str, Any], issues: Issues) -> None:
    """Adds what may be left out: the demo model, each agent's type and model, and the default agent."""
    if tree.get("llms") is None:
        tree["llms"] = {}
    llms, agents = tree["llms"], tree.get("agents")
    declared: list[str] = []
    if isinstance(llms, dict):
        declared = list(llms)
        llms.setdefault("demo", {"type": "demo"})
    if not isinstance(agents, dict):
        return
    usual = "default" if "default" in declared else declared[0] if declared else "demo"
    for agent_id, agent in agents.items():
        if agent is None:
            agents[agent_id] = agent = {}
        if not isinstance(agent, dict):
            continue
        agent.setdefault("type", "llm")
        if agent["type"] == "llm" and agent.get("llm") is None:
            agent["llm"] = usual
            if usual != "default" and len(declared) > 1:
                names = ", ".join(declared)
                issues.add(("agents", agent_id, "llm"), f"say which of the declared models it uses: {names}")
    if tree.get("default_agent") is None and agents:
        tree["default_agent"] = "assistant" if "assistant" in agents else next(iter(agents))
