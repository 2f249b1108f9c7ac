"""The demo model: offline, deterministic and honest about being none. A table of patterns, and a small paced stream."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator

import trio
from msgspec import Struct

from hector_trio.errors import RunError
from hector_trio.providers import Delta, ModelRequest, ModelResult, OnDelta, Turn

MAX_COUNT = 100_000
"""How far the demo counts."""
MAX_WAIT = 600.0
"""Seconds the demo waits at most when it is asked to wait."""
MAX_EXAMPLES = 10
_SEEN = 1000
"""Characters of a turn that the patterns see: input may be a megabyte, and patterns must stay cheap."""
_CHECKPOINT_EVERY = 8
"""Words between two checkpoints where no pace is set."""

GREETING = (
    "I am hector's built-in demo: there is no language model behind me, only a few fixed answers. "
    "I do read our conversation. Try “My name is Alice”, “What are AI agents?”, “Give me 3 examples”, "
    "“Write a short poem about rain”, “Count to 20”, “Emit data” or “How many messages did I send?”."
)
_NO_MODEL = "I am hector's built-in demo, without a language model"


class Wait(Struct, frozen=True):
    """A pause of so many seconds in an answer."""

    seconds: float


Step = str | Delta | Wait
"""A part of an answer: text of any length, a delta of another kind, a pause."""


class Conversation(Struct, frozen=True):
    """What the demo knows when it answers: the latest user turn and all turns before it."""

    prompt: str
    before: list[Turn]

    @property
    def earlier(self) -> list[str]:
        """The earlier user turns, the latest first, as far as the patterns see them."""
        return [turn.content[:_SEEN] for turn in reversed(self.before) if turn.role == "user"]


Rule = Callable[[re.Match[str], Conversation], Iterable[Step]]


def answer(turns: list[Turn]) -> Iterator[Step]:
    """The demo's answer to a conversation: the first rule whose pattern is found in the latest user turn.

    Raises RunError(``demo_failure``) where the demo was asked to fail.
    """
    last = max((i for i, turn in enumerate(turns) if turn.role == "user"), default=None)
    prompt = "" if last is None else turns[last].content
    conversation = Conversation(prompt, [] if last is None else turns[:last])
    for pattern, rule in RULES:
        match = re.search(pattern, prompt[:_SEEN])
        if match is not None:
            yield from rule(match, conversation)
            return


_WORD = re.compile(r"\S{1,1000}\s{0,1000}|\s{1,1000}")


def words(text: str) -> Iterator[str]:
    """``text`` in pieces of a word and the white space after it; joined they are ``text`` again."""
    return (match.group() for match in _WORD.finditer(text))


class DemoProvider:
    """A Provider without a model. ``words_per_second`` is its pace; 0: as fast as it can."""

    name = "demo"

    def __init__(self, words_per_second: float) -> None:
        if not words_per_second >= 0:
            raise ValueError(f"words_per_second must not be negative, not {words_per_second}")
        self._pause = 1 / words_per_second if words_per_second else 0.0

    async def stream(self, request: ModelRequest, on_delta: OnDelta) -> ModelResult:
        """Answers word by word; the first word comes at once.

        ``usage`` counts words: ``wordsIn`` (the whole conversation) and ``wordsOut``. Raises RunError
        (``demo_failure``) when asked to fail. A cancel ends it between two words.
        """
        sent = 0
        for step in answer(request.turns):
            if isinstance(step, Wait):
                await trio.sleep(step.seconds)
            elif isinstance(step, Delta):
                await on_delta(step)
            else:
                for word in words(step):
                    if sent and self._pause:
                        await trio.sleep(self._pause)
                    elif sent % _CHECKPOINT_EVERY == 0:
                        await trio.lowlevel.checkpoint()
                    await on_delta(Delta(word))
                    sent += 1
        words_in = sum(len(turn.content.split()) for turn in request.turns)
        return ModelResult(usage={"wordsIn": words_in, "wordsOut": sent})


# --- what the demo can do on request: every kind of chunk, failures, pauses -------------------------------------------


def _fail(_match: re.Match[str], _talk: Conversation) -> Iterator[Step]:
    yield "I fail now, as you asked. "
    raise RunError("demo_failure", "The demo failed because it was asked to")


_KINDS = {
    "data": ("Here is some data. ", {"items": [{"n": 1, "square": 1}, {"n": 2, "square": 4}], "source": "demo"}),
    "metadata": ("Here is some metadata. ", {"source": "demo", "kind": "example"}),
    "error": ("Here is an error that does not end the answer. ", "This is the demo's example of an error"),
}


def _emit(match: re.Match[str], _talk: Conversation) -> Iterator[Step]:
    for kind in re.findall(r"\b(metadata|data|error)", match["what"].lower()):
        text, content = _KINDS[kind]
        yield text
        yield Delta(content, kind)
    yield "That was all you asked for."


_SECONDS = {"ms": 0.001, "mi": 60.0, "se": 1.0, "s": 1.0, "": 1.0}


def _wait(match: re.Match[str], _talk: Conversation) -> Iterator[Step]:
    unit = (match["unit"] or "").lower()
    factor = 0.001 if unit.startswith("milli") else _SECONDS[unit[:2]]
    asked = float(match["n"]) * factor
    seconds = min(asked, MAX_WAIT)
    if asked > MAX_WAIT:
        yield f"I wait {MAX_WAIT:g} seconds at most. "
    yield Wait(seconds)
    yield f"I waited {seconds:g} seconds."


def _slow(_match: re.Match[str], _talk: Conversation) -> Iterator[Step]:
    yield "Slowly, then: "
    for n in range(1, 11):
        yield Wait(0.5)
        yield f"{n} "
    yield "and that is all."


def _repeat(match: re.Match[str], talk: Conversation) -> Iterator[Step]:
    yield talk.prompt[match.end() :]


def _count(match: re.Match[str], _talk: Conversation) -> Iterator[Step]:
    digits = re.sub(r"[,_ ]", "", match["n"])
    asked = int(digits) if len(digits) <= 9 else MAX_COUNT + 1
    if asked > MAX_COUNT:
        yield f"I count to {MAX_COUNT:,} at most. "
    top = min(asked, MAX_COUNT)
    for n in range(1, top):
        yield f"{n} "
    yield str(top)


# --- what the demo reads in the conversation --------------------------------------------------------------------------

_NAME = r"[^\W\d_][\w'’-]*(?:[ \t]+[A-Z][\w'’-]*){0,2}"
_MY_NAME = (
    rf"\b(?:(?i:my name is|my name's|my name’s|please call me|call me|i am called|i'm called)\s+"
    rf"|(?i:hello|hi|hey)\W{{1,3}}(?i:i am|i'm|i’m|this is)\s+(?=[A-Z]))(?P<name>{_NAME})"
)
_NOT_NAMES = frozenset({"a", "an", "and", "important", "it", "no", "not", "the", "what", "when", "a secret", "secret"})


def name_in(text: str) -> str | None:
    """The name that ``text`` gives its writer, the last one if there are several."""
    found = [match["name"] for match in re.finditer(_MY_NAME, text[:_SEEN]) if match["name"].lower() not in _NOT_NAMES]
    return found[-1] if found else None


def _known_name(talk: Conversation) -> str | None:
    told = (name_in(text) for text in [talk.prompt, *talk.earlier])
    return next((name for name in told if name is not None), None)


def _tell_name(_match: re.Match[str], talk: Conversation) -> Iterator[Step]:
    name = _known_name(talk)
    if name is None:
        yield "You have not told me your name in this conversation."
    else:
        yield f"Your name is {name}."


def _learn_name(_match: re.Match[str], talk: Conversation) -> Iterator[Step]:
    name = name_in(talk.prompt)
    if name is None:
        yield from _echo(_match, talk)
    else:
        yield (
            f"Hello {name}, nice to meet you! {_NO_MODEL}, but as long as this conversation lasts "
            "you can ask me for your name."
        )


def _hello(_match: re.Match[str], talk: Conversation) -> Iterator[Step]:
    name = _known_name(talk)
    yield f"Hello {name}! {GREETING}" if name else f"Hello! {GREETING}"


def _how_many(_match: re.Match[str], talk: Conversation) -> Iterator[Step]:
    mine = sum(turn.role == "assistant" for turn in talk.before)
    yours = len(talk.earlier) + 1
    yield (
        f"You have sent {yours} message{'' if yours == 1 else 's'}, this one included, "
        f"and I have answered {mine} before this answer."
    )


def _summarise(_match: re.Match[str], talk: Conversation) -> Iterator[Step]:
    said = talk.earlier[:10]
    if not said:
        yield "There is nothing to summarise yet: this is your first message."
        return
    yield f"You have sent {len(talk.earlier)} message{'' if len(talk.earlier) == 1 else 's'} before this one"
    yield ":\n" if len(said) == len(talk.earlier) else f"; the latest {len(said)}:\n"
    yield "\n".join(f"- {_quote(text)}" for text in reversed(said))


# --- what the demo pretends to know about -----------------------------------------------------------------------------

_AGENTS = (
    "AI agents are programs that pursue a goal on someone's behalf: they read a request, decide on the next step – "
    "often with a language model –, act through tools such as a search or another program's interface, look at the "
    "result, and go on until the goal is reached or they have to ask. What sets them apart from a plain chat is that "
    "they act and that they choose their steps themselves."
)
_QUANTUM = (
    "Quantum computing is computing with quantum states. A qubit can be in a superposition of 0 and 1, several qubits "
    "can be entangled, and a program is a sequence of operations that make the amplitudes of wrong answers cancel and "
    "those of right ones add up before a measurement picks one. For some problems, such as factoring large numbers or "
    "simulating molecules, this takes far fewer steps than any known ordinary program; for most it brings nothing."
)
_AGENT_EXAMPLES = (
    "a travel agent that compares trains and flights and books the one you confirm",
    "a support agent that looks up an order and starts the refund",
    "a coding agent that changes a program, runs its tests and tries again",
    "a research agent that reads many papers and reports with sources",
    "a calendar agent that finds a time that suits everybody",
    "an operations agent that reads an alert, looks at the logs and proposes a cure",
    "a data agent that turns a question into a database query and explains the answer",
    "a shopping agent that watches prices and tells you when to buy",
    "an inbox agent that sorts mail and drafts replies for you to send",
    "a home agent that turns the heating down when nobody is in",
)
_QUANTUM_EXAMPLES = (
    "Shor's algorithm, which factors large numbers",
    "Grover's algorithm, which searches an unsorted list in about the square root of its length",
    "simulating a molecule to find a better catalyst",
    "quantum phase estimation, which finds the energies of a system",
    "the variational eigensolver, which shares the work with an ordinary computer",
    "the quantum Fourier transform, a part of many other algorithms",
    "the Deutsch–Jozsa algorithm, the first clear proof of an advantage",
    "quantum annealing for scheduling problems",
    "quantum error correction with the surface code",
    "random circuit sampling, used to compare machines with ordinary computers",
)
_OTHER_EXAMPLES = (
    "the simplest case of {topic}, the one a textbook starts with",
    "{topic} as one meets it in daily life",
    "{topic} at work, where it saves somebody time",
    "{topic} in a small town",
    "{topic} seen by a child for the first time",
    "{topic} a hundred years ago",
    "{topic} a hundred years from now",
    "{topic} gone wrong, and what was learnt from it",
    "{topic} in a story",
    "the case of {topic} nobody had thought of",
)


class Topic(Struct, frozen=True):
    name: str
    explanation: str
    examples: tuple[str, ...]


KNOWN = (
    (r"(?i)\bagents?\b", Topic("AI agents", _AGENTS, _AGENT_EXAMPLES)),
    (r"(?i)\bquantum\b", Topic("quantum computing", _QUANTUM, _QUANTUM_EXAMPLES)),
)


def look_up(name: str) -> Topic:
    """What the demo has to say about ``name``: for all but a few, that it knows nothing."""
    for pattern, topic in KNOWN:
        if re.search(pattern, name):
            return topic
    nothing = f"You asked about “{name}”. {_NO_MODEL}, so I know nothing about it; a real model would explain it here."
    return Topic(name, nothing, tuple(example.format(topic=name) for example in _OTHER_EXAMPLES))


_ASKED = (
    r"(?i)(?:^|[.!?,;:]\s*|\b(?:please|you|me|and)\s+)(?:explain|describe|define|discuss|tell me (?:more )?about|"
    r"what (?:is|are|was|were)|what['’]s|who (?:is|are|was|were)|how (?:do|does|is|are))\s+(?:to me\s+)?"
    r"(?P<topic>[^\n.!?;]{1,80})"
)
_ABOUT = r"(?i)\b(?:about|regarding|concerning)\s+(?P<topic>[^\n.!?;]{1,80})"
_OUR_TALK = r"(?i)\b(?:examples?|my name|you|your|our (?:conversation|chat)|messages?)\b"


def _clean(topic: str | None) -> str:
    """A topic as a sentence names it, without quotes and manners."""
    return re.sub(r"[\s,]+(?:please|again|then|now)\W*$", "", topic or "", flags=re.I).strip(" ,:–-\"'“”")


def topic_of(text: str) -> str | None:
    """The topic that a turn asks about, if it asks about one outside the conversation itself."""
    for pattern in (_ASKED, _ABOUT):
        match = re.search(pattern, text[:_SEEN])
        if match is not None and not re.search(_OUR_TALK, match["topic"]):
            return _clean(match["topic"])
    return next((topic.name for pattern, topic in KNOWN if re.search(pattern, text[:_SEEN])), None)


def _earlier_topic(talk: Conversation) -> str | None:
    found = (topic_of(text) for text in talk.earlier)
    return next((topic for topic in found if topic), None)


def _explain(match: re.Match[str], talk: Conversation) -> Iterator[Step]:
    topic = topic_of(talk.prompt)
    if topic:
        yield look_up(topic).explanation
    else:
        yield from _echo(match, talk)


_NUMBERS = {"one": 1, "an": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}


def _examples(match: re.Match[str], talk: Conversation) -> Iterator[Step]:
    given = _clean(match["topic"])
    topic = given if given and given.lower() not in ("it", "that", "this", "them") else _earlier_topic(talk)
    if not topic:
        yield "Examples of what? Ask me about something first, for example “What are AI agents?”."
        return
    number = (match["n"] or "3").lower()
    asked = (int(number) if len(number) <= 4 else MAX_EXAMPLES + 1) if number.isdecimal() else _NUMBERS.get(number, 10)
    if asked > MAX_EXAMPLES:
        yield f"I have {MAX_EXAMPLES} examples at most. "
    asked = max(1, min(asked, MAX_EXAMPLES))
    known = look_up(topic)
    yield f"{'An example' if asked == 1 else f'{asked} examples'} of {known.name}:\n"
    yield "\n".join(f"{i}. {example}" for i, example in enumerate(known.examples[:asked], 1))


def _poem(match: re.Match[str], talk: Conversation) -> Iterator[Step]:
    topic = _clean(match["topic"]) or _earlier_topic(talk) or "nothing at all"
    yield (
        f"You asked for some lines about {topic},\n"
        "and I, who have no model, still comply:\n"
        "one word, then one more word, in single file,\n"
        "each sent to you as soon as it is by.\n"
        f"Of {topic} I know no more than you have said –\n"
        "a fixed verse with your subject stitched with thread."
    )


# --- everything else --------------------------------------------------------------------------------------------------


def _quote(text: str, limit: int = 80) -> str:
    flat = " ".join(text.split())
    return f"“{flat[:limit].rstrip()}…”" if len(flat) > limit else f"“{flat}”"


def _about_me(_match: re.Match[str], _talk: Conversation) -> Iterator[Step]:
    yield GREETING


def _echo(_match: re.Match[str], talk: Conversation) -> Iterator[Step]:
    if talk.prompt.strip():
        yield f"You said {_quote(talk.prompt[:_SEEN], 500)}. {_NO_MODEL}, so I have no better answer. "
        yield "Say “hello” to see what I can do."
    else:
        yield f"Your message was empty. {GREETING}"


_PLEASE = r"(?i)^\W*(?:(?:please|now|and|then|can you|could you|will you|would you)\s+){0,3}"

RULES: tuple[tuple[str, Rule], ...] = (
    (_PLEASE + r"(?:repeat(?: after me)?|echo)(?:\s*:\s*|\s+)(?=\S)", _repeat),
    (r"(?i)\bfail,? please\b|\bplease,? fail\b", _fail),
    (r"(?i)\b(?:emit|send)\b(?P<what>[^.?!]{0,80}\b(?:data|metadata|errors?)\b[^.?!]{0,80})", _emit),
    (
        r"(?i)\b(?:wait|sleep)\s+(?:for\s+)?(?P<n>\d{1,9}(?:\.\d{1,9})?)\s*"
        r"(?P<unit>ms|milliseconds?|seconds?|secs?|s|minutes?|mins?)?\b",
        _wait,
    ),
    (_PLEASE + r"(?:(?:be|go|answer|speak|stream)\s+)?(?:very\s+)?slow(?:ly)?\b", _slow),
    (r"(?i)\bcount\s+(?:up\s+|from 1\s+)?to\s+(?P<n>\d[\d_, ]{0,20})", _count),
    (r"(?i)\bwhat(?:['’]s| is| was)\s+my\s+name\b|\bwho\s+am\s+I\b|\b(?:know|remember)\s+my\s+name\b", _tell_name),
    (_MY_NAME, _learn_name),
    (r"(?i)\bhow many (?:messages|turns|questions|things)\b", _how_many),
    (r"(?i)\bsummari[sz]e\b|\bsummary of (?:our|the|this)\b|\brecap\b", _summarise),
    (
        r"(?i)(?:\b(?:give|show|name|list|tell)\b[^.?!\n]{0,30}?|^\W*(?=\d|(?:any|some|more|another|two|three|five|ten)\b))"
        r"\b(?:(?P<n>\d{1,9}|one|an|two|three|four|five|six|seven|eight|nine|ten)\s+)?(?:\w{1,20}\s+)?examples?\b"
        r"(?:\s+(?:of|about|for)\s+(?P<topic>[^\n.!?;]{1,80}))?",
        _examples,
    ),
    (r"(?i)\bpoem\b(?:[^.?!\n]{0,30}?\b(?:about|on|of)\s+(?P<topic>[^\n.!?;]{1,80}))?", _poem),
    (r"(?i)\b(?:who|what) are you\b|\bwhat can you do\b|^\W*help\b", _about_me),
    (_ASKED, _explain),
    (r"(?i)^\W*(?:hello|hi|hey|hallo|greetings|good (?:morning|afternoon|evening|day))\b", _hello),
    (r"", _echo),
)
"""What the demo answers to: the first pattern that is found decides. `re` compiles each when it is first looked for."""
