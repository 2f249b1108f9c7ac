"""YAML text becomes plain mappings, lists and values: bounded, without duplicate keys, with ``${NAME}`` expanded."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from hector_trio.config.building import Expanded
from hector_trio.config.issues import WRONG, Issues, Path
from hector_trio.errors import ConfigError

MAX_TEXT = 4 << 20
MAX_DEPTH = 64
MAX_NODES = 100_000
"""Bounds of a config: characters, nesting, and values once its YAML aliases are followed."""


_VARIABLE = re.compile(r"\$\$\{|\$\{([^{}]*)\}|\$\{")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


def read_file(path: str) -> str:
    """The text of a file, as far as it can be a config. Raises ConfigError."""
    try:
        with open(path, encoding="utf-8-sig") as file:
            return file.read(MAX_TEXT + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from None


class Reader:
    """Reads YAML into plain mappings, lists and values; adds what is wrong to the issues.

    It walks PyYAML's nodes itself, because PyYAML keeps the last of two equal keys in silence, follows aliases without
    bound, and makes dates and sets of things that are text to us.
    """

    def __init__(self, environ: Mapping[str, str], issues: Issues) -> None:
        self._environ = environ
        self._issues = issues
        self._constructor = yaml.constructor.SafeConstructor()
        self._nodes = 0
        self._open: set[int] = set()

    def read(self, text: str) -> Any:
        """Raises ConfigError at once where nothing sensible can follow: syntax and bounds."""
        if len(text) > MAX_TEXT:
            raise ConfigError(f"{self._issues.source}: is longer than {MAX_TEXT} characters")
        loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        try:
            self._check_depth(yaml.parse(text, Loader=loader))
            node = yaml.compose(text, Loader=loader)
            return None if node is None else self._value(node, ())
        except yaml.MarkedYAMLError as error:
            raise ConfigError(self._syntax(error, text)) from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{self._issues.source}: {' '.join(str(error).split())}") from None

    def _check_depth(self, events: Iterable[Any]) -> None:
        """The C composer recurses without a guard of its own, so this comes first."""
        depth = 0
        for event in events:
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                line = event.start_mark.line + 1
                raise ConfigError(f"{self._issues.source}: line {line}: nested deeper than {MAX_DEPTH}")

    def _syntax(self, error: Any, text: str) -> str:
        mark = error.problem_mark or error.context_mark
        message = ", ".join(part for part in (error.context, error.problem) if part) or "is not YAML"
        if mark is None:
            return f"{self._issues.source}: {message}"
        lines = text.splitlines()
        line = lines[mark.line] if mark.line < len(lines) else ""
        if "${" in line and ("{" in line.replace("${", "") or "[" in line):
            message += "; inside [ ] and { } a ${VARIABLE} must stand in quotes"
        elif "\t" in line:
            message += "; YAML indents with spaces, never with tabs"
        return f"{self._issues.source}: line {mark.line + 1}, column {mark.column + 1}: {message}"

    def _value(self, node: Any, path: Path) -> Any:
        self._nodes += 1
        if self._nodes > MAX_NODES:
            raise ConfigError(f"{self._issues.source}: more than {MAX_NODES} values; are aliases (*name) nested?")
        if id(node) in self._open:
            self._issues.add(path, "the alias contains itself")
            return None
        self._open.add(id(node))
        # Aliases add to each other what they hold, which the text's own depth does not show.
        if node.id != "scalar" and len(self._open) > MAX_DEPTH:
            line = node.start_mark.line + 1
            raise ConfigError(f"{self._issues.source}: line {line}: nested deeper than {MAX_DEPTH} through aliases")
        try:
            if node.id == "scalar":
                return self._scalar(node, path)
            if node.id == "sequence":
                return [self._value(item, (*path, f"[{at}]")) for at, item in enumerate(node.value)]
            return self._mapping(node, path)
        finally:
            self._open.discard(id(node))

    def _mapping(self, node: Any, path: Path) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        lines: dict[str, int] = {}
        for key, value in node.value:
            if key.tag == "tag:yaml.org,2002:merge":
                parts = self._value(value, path)
                for part in parts if isinstance(parts, list) else [parts]:
                    if isinstance(part, dict):
                        merged = {**part, **merged}
                    else:
                        self._issues.add(path, "<< takes a mapping or a list of mappings")
                continue
            line = key.start_mark.line + 1
            if key.id != "scalar":
                self._issues.add(path, f"line {line}: a key is text, not a list or mapping")
                continue
            name: str = key.value
            if name in own:
                self._issues.add((*path, name), f"declared twice, in lines {lines[name]} and {line}")
            lines[name] = line
            own[name] = self._value(value, (*path, name))
        return {**merged, **own}

    def _scalar(self, node: Any, path: Path) -> Any:
        tag = node.tag.removeprefix("tag:yaml.org,2002:")
        if tag in ("str", "timestamp", "value", "merge"):
            return self._expanded(node.value, path)
        if tag not in ("null", "bool", "int", "float"):
            self._issues.add(path, f"the YAML tag {node.tag} means nothing here")
            return None
        try:
            value = getattr(self._constructor, f"construct_yaml_{tag}")(node)
        except (ValueError, KeyError):
            self._issues.add(path, f"{node.value!r} is no {tag}")
            return None
        if isinstance(value, float) and not math.isfinite(value):
            self._issues.add(path, f"{node.value} is no finite number")
            return None
        return value

    def _expanded(self, text: str, path: Path) -> Any:
        if "${" not in text:
            return text
        before = len(self._issues.lines)

        def replace(match: re.Match[str]) -> str:
            if match[0] == "$${":
                return "${"
            name, has_default, default = (match[1] or "").partition(":-")
            if match[1] is None or not _NAME.match(name):
                self._issues.add(path, "write ${NAME} or ${NAME:-default} for a variable, and $${ for a literal ${")
            elif has_default or name in self._environ:
                return self._environ.get(name) or default
            else:
                self._issues.add(
                    path, f"the environment variable {name} is not set; set it, or give a default: ${{{name}:-value}}"
                )
            return ""

        whole = _VARIABLE.fullmatch(text)
        result = _VARIABLE.sub(replace, text)
        if len(self._issues.lines) > before:
            return WRONG
        return Expanded(result) if whole is not None and whole[1] is not None else result
