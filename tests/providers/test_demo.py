"""The demo model: its answers as pure functions of a conversation, and its paced stream."""

from __future__ import annotations

import re
import time

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from hector_trio.errors import RunError
from hector_trio.providers import Delta, ModelRequest, ModelResult, Turn
from hector_trio.providers.demo import MAX_COUNT, RULES, DemoProvider, Step, Wait, answer, name_in, topic_of, words


def steps(*prompts: str) -> list[Step]:
    """The demo's answer to the last of ``prompts``, after it has answered the others."""
    turns: list[Turn] = [Turn("system", "You are Bob. My name is System.")]
    for prompt in prompts[:-1]:
        turns.append(Turn("user", prompt))
        turns.append(Turn("assistant", "".join(step for step in answer(turns) if isinstance(step, str))))
    return list(answer([*turns, Turn("user", prompts[-1])]))


def say(*prompts: str) -> str:
    return "".join(step for step in steps(*prompts) if isinstance(step, str))


# --- answers ----------------------------------------------------------------------------------------------------------


def test_it_says_that_it_is_no_language_model() -> None:
    assert "I am hector's built-in demo: there is no language model behind me" in say("Hello")
    assert "without a language model" in say("Which stocks should be bought?")
    assert "I know nothing about it" in say("Explain black holes")


def test_it_remembers_a_name() -> None:
    assert say("My name is Alice").startswith("Hello Alice, nice to meet you!")
    assert say("My name is Alice", "What is my name?") == "Your name is Alice."


def test_it_looks_for_the_name_through_all_user_turns() -> None:
    assert say("My name is Alice", "What are AI agents?", "Count to 3", "who am I?") == "Your name is Alice."


def test_the_latest_name_wins() -> None:
    assert say("My name is Alice", "Call me Bob", "what's my name") == "Your name is Bob."


def test_it_says_so_if_it_was_never_told_a_name() -> None:
    assert say("What is my name?") == "You have not told me your name in this conversation."


def test_a_name_and_its_question_may_come_together() -> None:
    assert say("My name is Alice. What is my name?") == "Your name is Alice."


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("my name is alice", "alice"),
        ("Hi, I'm Alice and I like tea", "Alice"),
        ("My name is Alice Liddell and I like tea", "Alice Liddell"),
        ("my name's José!", "José"),
        ("My name is not important", None),
        ("hi, I'm fine", None),
        ("What is my name?", None),
    ],
)
def test_a_name_is_found_in_a_sentence(text: str, name: str | None) -> None:
    assert name_in(text) == name


def test_it_greets_by_name_once_it_knows_one() -> None:
    assert say("My name is Alice", "Hello").startswith("Hello Alice! ")


def test_it_explains_agents_and_quantum_computing() -> None:
    assert say("What are AI agents?").startswith("AI agents are programs that pursue a goal")
    assert say("Explain quantum computing").startswith("Quantum computing is computing with quantum states")


def test_examples_are_about_the_topic_before() -> None:
    text = say("What are AI agents?", "Give me 3 examples")
    assert text.startswith("3 examples of AI agents:\n1. ")
    assert text.count("\n") == 3


def test_examples_skip_turns_without_a_topic() -> None:
    assert "of quantum computing" in say("Explain quantum computing", "My name is Alice", "Give me 3 examples")
    assert "of black holes" in say("What are AI agents?", "Tell me about black holes", "show me some examples")


@pytest.mark.parametrize(
    ("prompt", "number"),
    [
        ("Give me 1 example", 1),
        ("Give me an example", 1),
        ("show me seven good examples", 7),
        ("list 10 examples", 10),
        ("give me 11 examples", 10),
        ("give me 999999999 examples", 10),
        ("give me 0 examples", 1),
        ("Give me examples", 3),
        ("5 examples please", 5),
    ],
)
def test_as_many_examples_as_asked_for_up_to_ten(prompt: str, number: int) -> None:
    lines = say("What are trains?", prompt).splitlines()[1:]
    assert [line.partition(".")[0] for line in lines] == [str(n) for n in range(1, number + 1)]


def test_examples_may_name_their_topic() -> None:
    assert say("Give me 2 examples of tax law, please").startswith("2 examples of tax law:")


def test_examples_without_a_topic_ask_for_one() -> None:
    assert say("Give me 3 examples").startswith("Examples of what?")
    assert say("Hello", "Give me 3 examples", "Give me 3 examples").startswith("Examples of what?")


def test_a_poem_is_about_what_was_asked() -> None:
    assert say("Write a short poem about AI").startswith("You asked for some lines about AI,\n")
    assert "about trains," in say("What are trains?", "A poem!")


def test_it_counts() -> None:
    assert say("Count to 20") == " ".join(str(n) for n in range(1, 21))
    assert say("please count up to 1") == "1"


def test_it_counts_no_further_than_its_bound() -> None:
    text = say("count to 999999999999999999")
    assert text.startswith("I count to 100,000 at most. 1 2 3 ")
    assert text.endswith(f" {MAX_COUNT}")


@pytest.mark.parametrize("prompt", ["Repeat: a b  c\nd", "echo a b  c\nd", "please repeat after me a b  c\nd"])
def test_it_repeats_exactly(prompt: str) -> None:
    assert say(prompt) == "a b  c\nd"


def test_a_long_text_is_repeated_whole() -> None:
    text = "word " * 50_000
    assert say("Repeat: " + text) == text


def test_it_counts_the_messages() -> None:
    assert say("How many messages?").startswith("You have sent 1 message, this one included, and I have answered 0 ")
    assert say("Hi", "Ho", "How many messages did I send?").startswith("You have sent 3 messages")


def test_it_summarises_the_conversation() -> None:
    assert say("Hi", "My name is Al", "Summarise our conversation").endswith(":\n- “Hi”\n- “My name is Al”")
    assert "nothing to summarise" in say("Summarize our conversation")
    assert "the latest 10" in say(*[f"thing {n}" for n in range(12)], "recap")


def test_anything_else_is_echoed_honestly() -> None:
    assert say("The cat sat").startswith("You said “The cat sat”. I am hector's built-in demo")
    assert say("").startswith("Your message was empty.")
    assert len(say("x" * 100_000)) < 1000


@pytest.mark.parametrize(
    ("prompt", "kinds"),
    [
        ("Emit data", ["data"]),
        ("please send me some data!", ["data"]),
        ("emit metadata", ["metadata"]),
        ("Could you emit an error?", ["error"]),
        ("emit data, then metadata and errors", ["data", "metadata", "error"]),
    ],
)
def test_it_emits_the_other_kinds_on_request_with_text_around(prompt: str, kinds: list[str]) -> None:
    given = steps(prompt)
    assert [step.kind for step in given if isinstance(step, Delta)] == kinds
    assert isinstance(given[0], str)
    assert isinstance(given[-1], str)


@pytest.mark.parametrize("prompt", ["fail please", "Please fail", "please, fail"])
def test_it_fails_on_request(prompt: str) -> None:
    with pytest.raises(RunError) as caught:
        steps(prompt)
    assert caught.value.run_code == "demo_failure"


def test_it_does_not_fail_when_failing_is_only_mentioned() -> None:
    assert say("Why do people fail?")


@pytest.mark.parametrize(
    ("prompt", "seconds"),
    [
        ("wait 3 seconds", 3.0),
        ("Please wait for 0.5 s", 0.5),
        ("sleep 2", 2.0),
        ("wait 200ms", 0.2),
        ("wait 200 milliseconds", 0.2),
        ("wait 2 minutes", 120.0),
        ("wait 999999999 seconds", 600.0),
    ],
)
def test_it_waits_on_request_and_not_for_ever(prompt: str, seconds: float) -> None:
    assert [step.seconds for step in steps(prompt) if isinstance(step, Wait)] == [pytest.approx(seconds)]


def test_slow_is_ten_pauses() -> None:
    assert sum(isinstance(step, Wait) for step in steps("slow please")) == 10


def test_a_conversation_without_a_user_turn_is_answered() -> None:
    assert list(answer([]))
    assert list(answer([Turn("system", "x")]))


@given(st.text())
def test_any_prompt_has_an_answer_and_the_same_one_again(prompt: str) -> None:
    try:
        assert say("What are trains?", prompt)
        assert say(prompt) == say(prompt)
    except RunError:
        assert "fail" in prompt.lower()


@given(st.text())
def test_words_join_to_the_text(text: str) -> None:
    assert "".join(words(text)) == text


def test_each_word_keeps_the_white_space_after_it() -> None:
    assert list(words("  one two\n\nthree")) == ["  ", "one ", "two\n\n", "three"]


def test_no_piece_is_large_whatever_the_text() -> None:
    assert max(map(len, words("x" * 10_000 + " " * 10_000))) <= 2000


@pytest.mark.parametrize(
    "unit",
    ["a", " ", "\n", "give ", "send ", "what is ", "please ", "poem ", "my name is ", "hi ", "1 ", "explain to me "],
)
def test_a_hostile_megabyte_is_answered_quickly(unit: str) -> None:
    text = unit * (1_000_000 // len(unit))
    start = time.thread_time()
    for pattern, _ in RULES:
        re.search(pattern, text[:1000])
    topic_of(text)
    name_in(text)
    assert time.thread_time() - start < 0.2


# --- the stream -------------------------------------------------------------------------------------------------------


def ask(prompt: str) -> ModelRequest:
    return ModelRequest([Turn("user", prompt)])


async def test_each_delta_is_a_word_and_usage_counts_words() -> None:
    deltas: list[Delta] = []

    async def keep(delta: Delta) -> None:
        deltas.append(delta)

    result = await DemoProvider(0).stream(ask("count to 3"), keep)
    assert deltas == [Delta("1 "), Delta("2 "), Delta("3")]
    assert result == ModelResult("stop", {"wordsIn": 3, "wordsOut": 3})


async def test_words_come_at_the_pace_and_the_first_at_once(autojump_clock: trio.testing.MockClock) -> None:
    times: list[float] = []
    start = trio.current_time()

    async def keep(_: Delta) -> None:
        times.append(trio.current_time() - start)

    await DemoProvider(4).stream(ask("count to 5"), keep)
    assert times == [pytest.approx(n * 0.25) for n in range(5)]


async def test_waiting_takes_the_time_asked_for(autojump_clock: trio.testing.MockClock) -> None:
    start = trio.current_time()

    async def keep(_: Delta) -> None:
        assert trio.current_time() - start == pytest.approx(30)

    await DemoProvider(0).stream(ask("wait 30 seconds"), keep)


async def test_without_a_pace_others_still_run_and_a_cancel_arrives() -> None:
    count = 0

    async def keep(_: Delta) -> None:
        nonlocal count
        count += 1

    with trio.fail_after(5), trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery:

            async def cancel_soon() -> None:
                for _ in range(10):
                    await trio.lowlevel.checkpoint()
                scope.cancel()

            nursery.start_soon(cancel_soon)
            await DemoProvider(0).stream(ask("count to 100000"), keep)
    assert scope.cancelled_caught
    assert 0 < count < 1000


@pytest.mark.parametrize("pace", [-1.0, float("nan")])
def test_a_pace_below_zero_is_refused(pace: float) -> None:
    with pytest.raises(ValueError, match="words_per_second"):
        DemoProvider(pace)
