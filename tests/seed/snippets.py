"""The snippets of SESSIONS_AND_STREAMING.md: found in the file, and the two named edits before they run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

SEED = Path(__file__).with_name("SESSIONS_AND_STREAMING.md")

SESSION_FLOW = "Session Flow"
STREAMING_FLOW = "Streaming Flow"
CHAT_SCRIPT = "Example 1: Multi-Turn Chat (Sessions)"
PYTHON_STREAM = "Example 2: Real-Time Streaming (WebSocket)"
COMBINED = "Example 3: Session + Streaming Combined"
TEST_SESSIONS = "Test Session Management"
TEST_STREAMING = "Test Streaming"

ADDRESS = "localhost:8080"
SESSION_ID = "550e8400-e29b-41d4-a716-446655440000"


class Snippet(NamedTuple):
    title: str
    language: str
    text: str


def snippets() -> list[Snippet]:
    """Every fenced block with the heading (or the bold line) above it, in order."""
    found: list[Snippet] = []
    title = ""
    language: str | None = None
    lines: list[str] = []
    for line in SEED.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            if language is None:
                language, lines = line[3:].strip(), []
            else:
                found.append(Snippet(title, language, "\n".join(lines) + "\n"))
                language = None
        elif language is not None:
            lines.append(line)
        elif heading := re.fullmatch(r"#+ (.+)|\*\*(.+?):?\*\*", line):
            title = heading[1] or heading[2]
    return found


def snippet(title: str) -> str:
    """The one block under ``title``."""
    (text,) = (each.text for each in snippets() if each.title == title)
    return text


def without_comments_in_bodies(script: str) -> str:
    """The first edit: a shell comment inside a single-quoted JSON body is stripped, because there it is none."""
    result = []
    quoted = False
    for line in script.splitlines():
        kept = re.sub(r'\s+# [^"]*$', "", line) if quoted else line
        if kept.count("'") % 2:
            quoted = not quoted
        result.append(kept)
    return "\n".join(result) + "\n"


def at(text: str, address: str, session_id: str | None = None) -> str:
    """The second edit: the fixed address, and the fixed session id where one is given, are substituted."""
    text = text.replace(ADDRESS, address)
    return text if session_id is None else text.replace(SESSION_ID, session_id)


def commands(script: str) -> list[str]:
    """The commands that a reader copies from a block, one by one: without comments and the answer that is shown."""
    found: list[str] = []
    pending = ""
    shown = False
    for line in without_comments_in_bodies(script).splitlines():
        if not pending and shown:
            shown = bool(line)
        elif not pending and (not line or line.startswith("#")):
            shown = line.startswith("# Response:")
        else:
            pending += line
            if pending.endswith("\\") or pending.count("'") % 2:
                pending += "\n"
            else:
                found.append(pending)
                pending = ""
    assert not pending, pending
    return found


def shown_answer(script: str) -> str:
    """The JSON that a block shows as the answer to its first command."""
    lines = script.splitlines()
    start = lines.index("# Response:") + 1
    return "\n".join(lines[start : lines.index("", start)])
