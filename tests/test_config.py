"""Configuration: what a file, the environment and the command line may say, and what is said about mistakes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hector_trio.config import (
    Auth,
    DemoLlm,
    LlmAgent,
    OpenAiLlm,
    PythonAgent,
    Server,
    Settings,
    Token,
    check_exposure,
    default_settings,
    describe,
    from_environment,
    is_loopback,
    load,
    load_file,
    secrets,
    variables_in,
)
from hector_trio.errors import ConfigError

CONFIGS = Path(__file__).parent.parent / "configs"
AGENTS = "agents: {assistant: {}}\n"
ENVIRON = {
    "OPENAI_API_KEY": "sk-" + "k" * 30,
    "OPENAI_MODEL": "some-model",
    "ALICE_TOKEN": "a" * 32,
    "OPS_TOKEN": "o" * 32,
}


def read(text: str, environ: dict[str, str] | None = None, **options: Any) -> Settings:
    return load(text, environ or {}, source="x.yaml", **options)


def complaint(text: str, environ: dict[str, str] | None = None, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text, environ, **options)
    return caught.value.detail


# --- what is right ----------------------------------------------------------------------------------------------------


def test_without_a_file_one_honest_demo_agent_is_there() -> None:
    settings = default_settings()
    assert list(settings.agents) == ["assistant"]
    assistant = settings.agents["assistant"]
    assert isinstance(assistant, LlmAgent)
    assert (assistant.name, assistant.llm, settings.default_agent) == ("Assistant", "demo", "assistant")
    assert "without a language model" in assistant.description
    assert settings.server == Server()


def test_without_a_file_flags_may_put_a_real_model_behind_the_assistant() -> None:
    settings = default_settings({}, {"llms": {"default": {"type": "openai", "model": "m1"}}})
    assistant = settings.agents["assistant"]
    assert isinstance(assistant, LlmAgent)
    assert assistant.llm == "default"
    assert "demo" not in assistant.description
    assert "m1" in assistant.description


def test_a_program_with_agents_of_its_own_needs_none_in_the_config() -> None:
    assert default_settings(need_agents=False).agents == {}
    assert read("server: {port: 1}", need_agents=False).server.port == 1


def test_an_agent_with_nothing_said_uses_the_demo_model() -> None:
    settings = read("agents:\n  a:\n  b: {name: B}\n")
    assert settings.agents == {"a": LlmAgent(llm="demo"), "b": LlmAgent(llm="demo", name="B")}
    assert settings.llms == {"demo": DemoLlm()}


def test_an_agent_uses_the_only_declared_model() -> None:
    settings = read("llms: {gpt: {type: openai, model: m}}\n" + AGENTS)
    assert settings.agents["assistant"] == LlmAgent(llm="gpt")
    assert set(settings.llms) == {"gpt", "demo"}


def test_an_agent_uses_the_model_called_default_among_several() -> None:
    settings = read("llms: {gpt: {type: openai, model: m}, default: {type: demo}}\n" + AGENTS)
    assert settings.agents["assistant"] == LlmAgent(llm="default")


def test_the_demo_model_can_be_declared_otherwise() -> None:
    settings = read("llms: {demo: {type: demo, words_per_second: 0}}\n" + AGENTS)
    assert settings.llms == {"demo": DemoLlm(words_per_second=0)}


def test_the_default_agent_is_the_assistant_or_the_first() -> None:
    assert read("agents: {zeta: {}, assistant: {}}").default_agent == "assistant"
    assert read("agents: {zeta: {}, alpha: {}}").default_agent == "zeta"
    assert read("agents: {zeta: {}, alpha: {}}\ndefault_agent: alpha").default_agent == "alpha"


def test_a_section_with_nothing_but_comments_keeps_its_defaults() -> None:
    settings = read("server:\nlimits:\n  # body_bytes: 1\nauth: {tokens: }\nllms:\n" + AGENTS)
    assert settings == read(AGENTS)


@pytest.mark.parametrize("host", ["0.0.0.0", "[0.0.0.0]", "${HOST}", "${NONE:-0.0.0.0}"])
def test_the_host_is_one_or_a_list(host: str) -> None:
    quoted = host if host.startswith("[") else f'"{host}"'
    assert read(f"server: {{host: {quoted}}}\n" + AGENTS, {"HOST": "0.0.0.0"}).server.host == ["0.0.0.0"]


def test_addresses_lose_their_last_slash() -> None:
    server = read('server: {base_url: "https://h.example/x/", root_path: /x/}\n' + AGENTS).server
    assert (server.base_url, server.root_path) == ("https://h.example/x", "/x")


def test_keys_are_text_even_where_yaml_sees_something_else() -> None:
    settings = read("agents: {no: {}, 123: {}}")
    assert list(settings.agents) == ["no", "123"]


def test_a_date_in_free_data_stays_text() -> None:
    agent = read("agents: {a: {metadata: {since: 2024-01-01}}}").agents["a"]
    assert agent.metadata == {"since": "2024-01-01"}


def test_anchors_and_merges_work() -> None:
    settings = read("agents:\n  a: &a {name: A, version: '2'}\n  b: {<<: *a, name: B}\n")
    assert settings.agents["b"] == LlmAgent(llm="demo", name="B", version="2")


# --- variables in the file --------------------------------------------------------------------------------------------


def test_a_variable_alone_takes_the_type_of_its_key() -> None:
    settings = read(
        "server: {port: '${PORT}', insecure: '${INSECURE}', allow_origins: '${ORIGINS}'}\n"
        "tasks: {timeout: '${TIMEOUT}'}\nagents: {a: {name: '${PORT}'}}",
        {"PORT": "9000", "INSECURE": "true", "ORIGINS": "https://a.example, https://b.example", "TIMEOUT": "2.5"},
    )
    assert settings.server.port == 9000
    assert settings.server.insecure is True
    assert settings.server.allow_origins == ["https://a.example", "https://b.example"]
    assert settings.tasks.timeout == 2.5
    assert settings.agents["a"].name == "9000"


def test_a_variable_inside_text_stays_text() -> None:
    agent = read("agents: {a: {description: 'in ${CITY}, ${LAND:-nowhere}'}}", {"CITY": "Ulm"}).agents["a"]
    assert agent.description == "in Ulm, nowhere"


def test_a_doubled_dollar_is_a_literal_one() -> None:
    agent = read("agents: {a: {description: 'say $${NAME}, $5 and $$'}}").agents["a"]
    assert agent.description == "say ${NAME}, $5 and $$"


def test_an_empty_variable_is_no_value_for_a_key_that_may_have_none() -> None:
    text = "llms: {m: {type: openai, model: x, api_key: '${KEY}'}}\n" + AGENTS
    assert read(text, {"KEY": ""}).llms["m"] == OpenAiLlm(model="x")


def test_a_default_counts_for_an_empty_variable_too() -> None:
    assert read("agents: {a: {name: '${N:-B}'}}", {"N": ""}).agents["a"].name == "B"


def test_what_a_variable_holds_is_never_read_as_yaml_or_expanded_again() -> None:
    value = "x\nagents: {evil: {}}\n${HOME}"
    settings = read("agents: {a: {description: '${D}'}}", {"D": value})
    assert settings.agents["a"].description == value
    assert list(settings.agents) == ["a"]


def test_a_missing_variable_is_named_with_the_way_out() -> None:
    assert complaint("agents: {a: {description: 'hi ${WHO}'}}") == (
        "x.yaml: agents.a.description: the environment variable WHO is not set; set it, or give a default:"
        " ${WHO:-value}"
    )


@pytest.mark.parametrize("text", ["${}", "${A B}", "${A-b}", "${A", "${A:-${B}}", "${1}"])
def test_a_variable_written_wrong_says_how_to_write_it(text: str) -> None:
    assert "x.yaml: agents.a.name: write ${NAME} or ${NAME:-default}" in complaint(f"agents: {{a: {{name: '{text}'}}}}")


@given(st.text())
def test_text_without_variables_is_kept_as_it_is(text: str) -> None:
    if "${" not in text:
        quoted = yaml.safe_dump({"agents": {"a": {"description": text}}}, allow_unicode=False)
        assert read(quoted).agents["a"].description == text


# --- layers -----------------------------------------------------------------------------------------------------------


def test_defaults_give_way_to_variables_they_to_the_file_and_it_to_flags() -> None:
    environ = {"HECTOR_SERVER_PORT": "1001", "HECTOR_LIMITS_RUNNING": "7", "HECTOR_LOG_ACCESS": "true"}
    text = "server: {port: 1002, root_path: /x}\nlimits: {running: 8}\n" + AGENTS
    settings = read(text, environ, flags={"server": {"port": 1003}})
    assert settings.server.port == 1003
    assert settings.limits.running == 8
    assert settings.log.access is True
    assert settings.server.root_path == "/x"


def test_flags_that_were_not_given_change_nothing() -> None:
    flags = {"server": {"port": None, "host": (), "tls": {"cert": None, "key": None}}, "store": {"url": None}}
    assert read("server: {port: 1002}\n" + AGENTS, flags=flags) == read("server: {port: 1002}\n" + AGENTS)


def test_flags_may_repeat_for_lists() -> None:
    assert read(AGENTS, flags={"server": {"host": ("::1", "127.0.0.1")}}).server.host == ["::1", "127.0.0.1"]


def test_a_model_of_another_kind_inherits_nothing_from_the_one_below() -> None:
    text = "llms: {m: {type: demo, words_per_second: 1}}\nagents: {a: {llm: m}}"
    settings = read(text, flags={"llms": {"m": {"type": "openai", "model": "x"}}})
    assert settings.llms["m"] == OpenAiLlm(model="x")


def test_a_model_of_the_same_kind_is_changed_key_by_key() -> None:
    text = "llms: {m: {type: openai, model: x, max_retries: 1}}\nagents: {a: {llm: m}}"
    settings = read(text, flags={"llms": {"m": {"model": "y"}}})
    assert settings.llms["m"] == OpenAiLlm(model="y", max_retries=1)


def test_every_plain_key_has_its_variable() -> None:
    environ = {
        "HECTOR_SERVER_HOST": "127.0.0.1,::1",
        "HECTOR_SERVER_TLS_CERT": "c.pem",
        "HECTOR_SERVER_TLS_KEY": "k.pem",
        "HECTOR_STORE_URL": "memory",
        "HECTOR_LIMITS_BODY_BYTES": "5",
        "HECTOR_TASKS_TIMEOUT": "5",
        "HECTOR_DEFAULT_AGENT": "b",
    }
    settings = read("agents: {a: {}, b: {}}", environ)
    assert settings.server.host == ["127.0.0.1", "::1"]
    assert settings.server.tls is not None
    assert settings.server.tls.cert == "c.pem"
    assert settings.store.url == "memory"
    assert settings.limits.body_bytes == 5
    assert settings.tasks.timeout == 5
    assert settings.default_agent == "b"


def test_the_clients_variables_and_empty_ones_are_no_settings() -> None:
    environ = {"HECTOR_SERVER": "http://h:1", "HECTOR_TOKEN": "t", "HECTOR_CONFIG": "c", "HECTOR_SERVER_PORT": ""}
    assert from_environment(environ) == ({}, {}, [])


def test_an_unknown_variable_is_a_warning_with_the_nearest_name() -> None:
    overrides = from_environment({"HECTOR_SERVER_PROT": "1", "HECTOR_AGENTS_A_NAME": "x", "OTHER": "y"})
    assert overrides.values == {}
    assert overrides.warnings == [
        "HECTOR_AGENTS_A_NAME: agents can be declared in a config file only; the variable is ignored",
        "HECTOR_SERVER_PROT: no such setting; did you mean HECTOR_SERVER_PORT?; the variable is ignored",
    ]


def test_a_variable_that_the_file_takes_is_not_called_unknown() -> None:
    used = variables_in("agents: {a: {name: '${HECTOR_NAME}', version: '${HECTOR_V:-1}', description: $HECTOR_D}}")
    assert used == {"HECTOR_NAME", "HECTOR_V"}
    environ = {"HECTOR_NAME": "x", "HECTOR_V": "2", "HECTOR_D": "y"}
    (warning,) = from_environment(environ, used).warnings
    assert warning.startswith("HECTOR_D: no such setting")


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("HECTOR_SERVER_PORT", "http", "server.port: expected an integer from 0 to 65535, got 'http'"),
        ("HECTOR_SERVER_PORT", "70000", "server.port: expected an integer from 0 to 65535, got '70000'"),
        ("HECTOR_LOG_ACCESS", "maybe", "log.access: expected true or false, got 'maybe'"),
        ("HECTOR_LOG_LEVEL", "debgu", "expected one of debug, info, warning, error, got 'debgu'; did you mean debug?"),
        ("HECTOR_TASKS_TIMEOUT", "nan", "tasks.timeout: expected a number above 0 and at most 315360000, got 'nan'"),
        ("HECTOR_SERVER_HOST", "127.0.0.1,a b", "server.host[1]: 'a b' is no address or host name"),
    ],
)
def test_a_bad_variable_is_named(name: str, value: str, says: str) -> None:
    assert complaint(AGENTS, {name: value}).startswith(f"{name}: ")
    assert says in complaint(AGENTS, {name: value})


def test_a_bad_flag_is_said_to_come_from_the_command_line() -> None:
    assert complaint("server: {port: 1}\n" + AGENTS, flags={"server": {"port": -1}}) == (
        "command line: server.port: expected an integer from 0 to 65535, got -1"
    )


# --- what is wrong ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "agents: is missing"),
        ("agents: {}", "agents: is missing"),
        ("- a", "a config is a mapping with the keys server, store"),
        ("agents: [a]", "agents: expected a mapping of ids to agents, such as `agents: {assistant: {}}`, got a list"),
        ("agents: {a: 3}", "agents.a: expected a mapping, got 3"),
        ("agent: {a: {}}", "agent: unknown key; did you mean agents? (allowed: server, store,"),
        (
            "agents: {a: {lm: x}}",
            "agents.a.lm: unknown key; did you mean llm? (allowed: type, llm, name, description, version,"
            " instructions, parameters, grace, max_grace, metadata, a2a)",
        ),
        ("agents: {a: {function: 'm:f'}}", "agents.a.function: belongs to `type: python`, and this is `type: llm`"),
        ("agents: {a: {type: pyton}}", "agents.a.type: expected one of llm, python, got 'pyton'; did you mean python?"),
        ("agents: {a: {type: [x]}}", "agents.a.type: expected one of llm, python, got a list"),
        ("llms: {m: {type: {x: y}}}\n" + AGENTS, "llms.m.type: expected one of demo, openai, got a mapping"),
        ("agents: {a: {type: python}}", "agents.a.function: is missing; it takes text"),
        ("agents: {a: {type: python, function: main}}", "agents.a.function: 'main' is no function, such as"),
        ("agents: {a/b: {}}", "agents.a/b: an agent's id is 1 to 128 characters of"),
        ("agents: {'..': {}}", "an agent's id is"),
        (
            "llms: {gpt: {type: openai, model: m}}\nagents: {a: {llm: gtp}}",
            "agents.a.llm: no model 'gtp' is declared under llms; did you mean gpt? (there are: gpt, demo)",
        ),
        (
            "llms: {m: {type: demo}, n: {type: demo}}\nagents: {a: {}}",
            "agents.a.llm: say which of the declared models it uses: m, n",
        ),
        ("llms: {m: {model: x}}\n" + AGENTS, "llms.m.type: is missing; it is one of demo, openai"),
        ("llms: {m: {type: openai}}\n" + AGENTS, "llms.m.model: is missing; it takes text"),
        ("llms: {m: {type: openai, model: 4}}\n" + AGENTS, "llms.m.model: expected text, got 4; put it in quotes"),
        ("llms: {m: {type: openai, model: x, base_url: ftp://x}}\n" + AGENTS, "'ftp://x' is no http(s) address"),
        (
            "llms: {m: {type: openai, model: x, headers: {a b: c}}}\n" + AGENTS,
            "llms.m.headers: 'a b' is no header name",
        ),
        ("agents: {a: {version: 1.0}}", "agents.a.version: expected text, got 1.0; put it in quotes"),
        (
            "default_agent: assistent\n" + AGENTS,
            "default_agent: there is no agent 'assistent'; did you mean assistant?",
        ),
        ("server: {port: 80.5}\n" + AGENTS, "server.port: expected an integer from 0 to 65535, got 80.5"),
        ("server: {port: '80'}\n" + AGENTS, "server.port: expected an integer from 0 to 65535, got '80'"),
        ("server: {port: true}\n" + AGENTS, "server.port: expected an integer from 0 to 65535, got true"),
        ("server: {insecure: 1}\n" + AGENTS, "server.insecure: expected true or false, got 1"),
        ("server: {host: []}\n" + AGENTS, "server.host: the list is empty"),
        ("server: {host: '[::1]'}\n" + AGENTS, "server.host[0]: write the address without brackets: ::1"),
        ("server: {host: 300.1.1.1}\n" + AGENTS, "server.host[0]: '300.1.1.1' is no address or host name"),
        ("server: {host: [3]}\n" + AGENTS, "server.host[0]: expected text, got 3; put it in quotes"),
        ("server: {host: {a: b}}\n" + AGENTS, "server.host: expected a list of texts, got a mapping"),
        ("server: {uds: a.sock, fd: 3}\n" + AGENTS, "server.uds: listen on server.uds or on server.fd, not on both"),
        ("server: {trusted_proxies: [10.0.0.0/33]}\n" + AGENTS, "server.trusted_proxies[0]: '10.0.0.0/33' is no"),
        ("server: {allow_origins: ['https://a.b/']}\n" + AGENTS, "an origin has no path: write https://a.b"),
        ("server: {allow_origins: [a.b]}\n" + AGENTS, "server.allow_origins[0]: 'a.b' is no origin, such as"),
        ("server: {allowed_hosts: ['a.b:80']}\n" + AGENTS, "server.allowed_hosts[0]: 'a.b:80' is no host name"),
        ("push: {allow: ['http://a.b']}\n" + AGENTS, "push.allow[0]: 'http://a.b' is no network"),
        ("push: {allow: ['a.b:80']}\n" + AGENTS, "push.allow[0]: 'a.b:80' is no network"),
        ("push: {allow: [10.0.0.0/33]}\n" + AGENTS, "push.allow[0]: '10.0.0.0/33' is no network"),
        ("push: {allow: ['*']}\n" + AGENTS, "push.allow[0]: '*' is no host name, address or network"),
        ("push: {timeout: 61}\n" + AGENTS, "push.timeout"),
        ("server: {base_url: 'localhost:80'}\n" + AGENTS, "server.base_url: 'localhost:80' is no http(s) address"),
        ("server: {root_path: x}\n" + AGENTS, "server.root_path: 'x' is no path prefix, such as /hector"),
        ("server: {tls: {cert: c}}\n" + AGENTS, "server.tls.key: is missing; it takes text"),
        ("store: {url: ~/x.db}\n" + AGENTS, "store.url: ~ is not expanded here; write ${HOME}/..."),
        (
            "store: {url: 'postgresql://x'}\n" + AGENTS,
            "store.url: 'postgresql://x' is no store: it is a file's path, sqli",
        ),
        ("store: {url: 'sqlite://x.db'}\n" + AGENTS, "store.url: 'sqlite://x.db' is no store"),
        ("store: {url: 'sqlite:///x.db?mode=ro'}\n" + AGENTS, "(no host, no options)"),
        ("store: {url: 'sqlite:///'}\n" + AGENTS, "store.url: is empty"),
        ("store: {url: ':memory:'}\n" + AGENTS, "sqlite:///path (no host, no options) or memory"),
        ("store: {durability: all}\n" + AGENTS, "store.durability: expected one of process, full, got 'all'"),
        ("tasks: {timeout: 20, max_timeout: 10}\n" + AGENTS, "tasks.timeout: 20 is more than tasks.max_timeout, 10"),
        ("tasks: {timeout: .inf}\n" + AGENTS, "tasks.timeout: .inf is no finite number"),
        ("limits: {running: 0}\n" + AGENTS, "limits.running: expected an integer from 1 to 1099511627776, got 0"),
        (
            "limits: {body_bytes: 99999999999999999999999}\n" + AGENTS,
            "limits.body_bytes: expected an integer from 1 to 1099511627776, got 99999999999999999999999",
        ),
        ("limits: {sockets: 99999999999999999999999}\n" + AGENTS, "limits.sockets: expected an integer from 1 to"),
        ("limits: {json_depth: 5000}\n" + AGENTS, "limits.json_depth: expected an integer from 1 to 512, got 5000"),
        ("limits: {chunk_bytes: 9, log_bytes: 8}\n" + AGENTS, "limits.chunk_bytes: 9 is more than limits.log_bytes, 8"),
        (
            "limits: {body_bytes: 9, unread_bytes: 8}\n" + AGENTS,
            "limits.body_bytes: 9 is more than limits.unread_bytes",
        ),
        ("limits: {send_timeout: 1.0e+300}\n" + AGENTS, "limits.send_timeout: expected a number above 0 and at most 3"),
        ("tasks: {retention: 1.0e+12}\n" + AGENTS, "tasks.retention: expected a number from 0 to 315360000, got"),
        ("server: !!python/name:os.system ''\n" + AGENTS, "means nothing here"),
        ("server:\n  port: 1\n  port: 2\n" + AGENTS, "server.port: declared twice, in lines 2 and 3"),
        ("agents: {a: {}}\nagents: {b: {}}\n", "agents: declared twice, in lines 1 and 2"),
        ("agents:\n  a: {\n", "line 3, column 1: "),
        ("agents:\n\ta: {}\n", "found character that cannot start any token; YAML indents with spaces"),
        ("server: {port: ${P}}\n" + AGENTS, "a ${VARIABLE} must stand in quotes"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
        ("a: *b\n", "found undefined alias"),
        ("agents: {a: &x {metadata: {self: *x}}}", "the alias contains itself"),
        ("? [a, b]\n: c\n" + AGENTS, "line 1: a key is text"),
        ("x: \0", "x.yaml: "),
        ("[" * 500, "nested deeper than 64"),
        ("[" * 100_000, "nest"),  # newer versions of libyaml refuse it themselves
        ("- " * 100_000, "nested deeper than 64"),
    ],
)
def test_a_mistake_is_told_with_its_place_and_what_would_be_right(text: str, says: str) -> None:
    first = complaint(text).splitlines()[0]
    assert first.startswith("x.yaml: ")
    assert says in first


def test_nested_aliases_cannot_blow_up() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
    assert "are aliases (*name) nested?" in complaint(bomb)


def test_chained_aliases_cannot_be_nested_deeper_than_the_text_may_be() -> None:
    chain = "a0: &a0 x\n" + "".join(f"a{n}: &a{n} {'[' * 55}*a{n - 1}{']' * 55}\n" for n in range(1, 13))
    assert complaint(chain) == "x.yaml: line 2: nested deeper than 64 through aliases"
    deep = f"agents: {{a: {{metadata: {{x: {'[' * 60}1{']' * 60}}}}}}}"
    assert read(deep).agents["a"].metadata["x"]


def test_all_mistakes_are_told_at_once_each_on_its_line() -> None:
    lines = complaint("server: {prot: 1, port: x}\nlog: {level: x}\nagents: {a: {llm: b}}\n").splitlines()
    assert [line.split(": ")[1] for line in lines] == ["server.prot", "server.port", "log.level", "agents.a.llm"]


def test_tokens_must_be_long_different_and_able_to_stand_in_a_header() -> None:
    text = """
auth:
  tokens:
    - {name: a, token: short}
    - {name: b, token: "sixteen characters with spaces"}
    - {name: " ", token: xxxxxxxxxxxxxxxx}
    - {name: d, token: 1234567890123456}
"""
    lines = complaint(text + AGENTS).splitlines()
    assert "auth.tokens[0].token: is too short: 5 characters, at least 16" in lines[0]
    assert "auth.tokens[1].token: holds spaces" in lines[1]
    assert "auth.tokens[2].name: ' ' is no name" in lines[2]
    assert lines[3] == "x.yaml: auth.tokens[3].token: expected text, got something else; put it in quotes"


def test_two_tokens_share_neither_name_nor_secret() -> None:
    text = "auth: {tokens: [{name: a, token: xxxxxxxxxxxxxxxx}, {name: a, token: xxxxxxxxxxxxxxxx}]}\n"
    assert complaint(text + AGENTS).splitlines() == [
        "x.yaml: auth.tokens[1].name: 'a' is already the name of tokens[0]",
        "x.yaml: auth.tokens[1].token: is the same as that of tokens[0]",
    ]


def test_a_complaint_never_repeats_a_secret() -> None:
    text = (
        "auth: {tokens: [{name: a, token: '${T}'}, {name: b, token: '${T}'}]}\n"
        "llms: {m: {type: openai, model: x, api_key: 'key with spaces', headers: {X: '${H}'}}}\n" + AGENTS
    )
    said = complaint(text, {"T": "tok en-secret", "H": "line\nsecret"})
    assert "secret" not in said.replace("X: ", "")
    assert "key with" not in said


def test_the_settings_know_their_secrets() -> None:
    text = (
        "auth: {tokens: [{name: a, token: aaaaaaaaaaaaaaaa}]}\n"
        "llms: {m: {type: openai, model: x, api_key: kkk, headers: {X: hhh}}}\n" + AGENTS
    )
    assert secrets(read(text)) == ["aaaaaaaaaaaaaaaa", "kkk", "hhh"]


@given(st.text(max_size=200))
def test_any_text_is_read_or_refused_with_a_line(text: str) -> None:
    refusal = ""
    try:
        read(text)
    except ConfigError as error:
        refusal = error.detail
    assert not refusal or refusal.startswith("x.yaml: ")


# --- files ------------------------------------------------------------------------------------------------------------


def test_paths_in_a_file_are_relative_to_its_folder(tmp_path: Path) -> None:
    (tmp_path / "agents").mkdir()
    (tmp_path / "agents/a.py").write_text("")
    for name in ("c.pem", "k.pem"):
        (tmp_path / name).write_text("")
    path = tmp_path / "x.yaml"
    path.write_text(
        "server: {tls: {cert: c.pem, key: k.pem}, uds: run.sock}\nstore: {url: data/h.db}\n"
        "agents: {a: {type: python, function: 'agents/a.py:run'}, b: {type: python, function: 'pkg.mod:run'}}\n"
    )
    settings = load_file(str(path), {})
    assert settings.server.tls is not None
    assert settings.server.tls.cert == str(tmp_path / "c.pem")
    assert settings.server.uds == str(tmp_path / "run.sock")
    assert settings.store.url == str(tmp_path / "data/h.db")
    assert settings.agents["a"] == PythonAgent(function=f"{tmp_path}/agents/a.py:run")
    assert settings.agents["b"] == PythonAgent(function="pkg.mod:run")


def test_paths_from_elsewhere_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(AGENTS)
    assert load_file(str(path), {}).store.url == ".hector/hector.db"
    assert load_file(str(path), {"HECTOR_STORE_URL": "a/b.db"}).store.url == "a/b.db"
    assert load_file(str(path), {}, {"store": {"url": "c/d.db"}}).store.url == "c/d.db"
    path.write_text("store: {url: memory}\n" + AGENTS)
    assert load_file(str(path), {}).store.url == "memory"


@pytest.mark.parametrize(
    ("url", "file"),
    [
        ("sqlite:///data/h.db", "{}/data/h.db"),
        ("sqlite:////var/h.db", "/var/h.db"),
        ("sqlite:///memory", "{}/memory"),
        ("memory", "memory"),
    ],
)
def test_a_store_may_be_named_by_a_url(tmp_path: Path, url: str, file: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"store: {{url: '{url}'}}\n" + AGENTS)
    assert load_file(str(path), {}).store.url == file.format(tmp_path)
    assert default_settings({"HECTOR_STORE_URL": "sqlite:///memory"}).store.url == "./memory"


def test_a_store_cannot_be_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("store: {url: .}\n" + AGENTS)
    with pytest.raises(ConfigError, match=r"store\.url: .* is a folder; name a file in it, such as .*/hector\.db"):
        load_file(str(path), {})


def test_files_that_are_not_there_are_named(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(
        "server: {tls: {cert: c.pem, key: k.pem}}\nagents: {a: {type: python, function: 'a.py:run'}}\n",
    )
    with pytest.raises(ConfigError) as caught:
        load_file(str(path), {})
    assert caught.value.detail.splitlines() == [
        f"{path}: server.tls.cert: there is no file {tmp_path}/c.pem",
        f"{path}: server.tls.key: there is no file {tmp_path}/k.pem",
        f"{path}: agents.a.function: there is no file {tmp_path}/a.py",
    ]


def test_a_config_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    with pytest.raises(ConfigError, match="cannot be read: No such file or directory"):
        load_file(str(path), {})
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_file(str(tmp_path), {})
    path.write_bytes(b"agents: \xff")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        load_file(str(path), {})


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + AGENTS.encode())
    assert list(load_file(str(path), {}).agents) == ["assistant"]


# --- exposure ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.8.8", "::1", "localhost", "LOCALHOST.", "[::1]"])
def test_loopback_needs_no_tokens(host: str) -> None:
    assert is_loopback(host)
    check_exposure(Settings(server=Server(host=[host])))


@pytest.mark.parametrize(
    "host", ["0.0.0.0", "::", "10.0.0.1", "example.com", "localhost.example.com", "::ffff:1.2.3.4"]
)
def test_a_bind_that_others_can_reach_needs_tokens_or_a_word(host: str) -> None:
    with pytest.raises(ConfigError, match=r"auth\.tokens.*--insecure"):
        check_exposure(Settings(server=Server(host=["127.0.0.1", host])))
    check_exposure(Settings(server=Server(host=[host], insecure=True)))
    check_exposure(Settings(server=Server(host=[host]), auth=Auth(tokens=[Token(name="a", token="t" * 16)])))


def test_sockets_opened_by_others_count_by_their_address() -> None:
    settings = Settings(server=Server(fd=3))
    check_exposure(settings)
    check_exposure(settings, ["127.0.0.1"])
    with pytest.raises(ConfigError):
        check_exposure(settings, ["0.0.0.0"])


# --- the shipped files and the reference ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_can_be_used(path: Path) -> None:
    settings = load(path.read_text(), ENVIRON, source=path.name, base=str(CONFIGS))
    assert settings.default_agent in settings.agents
    check_exposure(settings)


def test_the_first_config_starts_without_a_key_and_without_files() -> None:
    settings = load_file(str(CONFIGS / "a2a-server.yaml"), {})
    assert settings.agents["assistant"].name == "Assistant"
    assert isinstance(settings.llms["demo"], DemoLlm)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_key_of_a_shipped_config_has_a_comment(path: Path) -> None:
    before = ""
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if re.match(r"\s*(- )?[\w-]+:", line):
            assert "  # " in line or before.lstrip().startswith("# "), f"{path.name}:{number}: {line}"
        before = line


def test_the_commented_model_in_the_first_config_works_when_the_signs_are_taken_away() -> None:
    text = (CONFIGS / "a2a-server.yaml").read_text()
    text = re.sub(r"^  # (?=(real|  (type|model|base_url|api_key)):)", "  ", text, flags=re.M)
    text = text.replace("llm: demo", "llm: real")
    settings = load(text, ENVIRON, source="x")
    assert isinstance(settings.llms["real"], OpenAiLlm)
    assert settings.llms["real"].api_key == ENVIRON["OPENAI_API_KEY"]


def uncommented_reference() -> Any:
    text = (CONFIGS / "reference.yaml").read_text()
    return yaml.safe_load(re.sub(r"^(\s*)# ( *(- )?[a-z_]+:( .*)?)$", r"\1\2", text, flags=re.M))


def test_the_reference_holds_every_key_with_its_default_and_explanation() -> None:
    tree = uncommented_reference()
    text = (CONFIGS / "reference.yaml").read_text().replace("`", "")
    instances = {
        "llms.NAME.": list(tree["llms"].values()),
        "agents.ID.": list(tree["agents"].values()),
        "auth.tokens[].": tree["auth"]["tokens"],
    }
    for key in describe():
        places = [tree]
        rest = key.path
        for prefix, found in instances.items():
            if rest.startswith(prefix):
                places, rest = found, rest.removeprefix(prefix)
        for part in rest.split(".")[:-1]:
            found = [place[part.removesuffix("[]")] for place in places if part.removesuffix("[]") in place]
            places = [item for each in found for item in each] if part.endswith("[]") else found
        assert any(rest.split(".")[-1] in place for place in places), key.path
        doc = re.sub(r"^\(\w+\) ", "", key.doc).replace("`", "")
        if not key.path.startswith("auth.tokens[]."):
            assert doc in text, key.path


def test_the_reference_changes_nothing_but_models_and_agents() -> None:
    reference = load((CONFIGS / "reference.yaml").read_text(), {}, source="reference.yaml")
    default = Settings()
    for section in ("server", "store", "auth", "tasks", "limits", "push", "log"):
        assert getattr(reference, section) == getattr(default, section)
    assert reference.llms["demo"] == DemoLlm()
    assert reference.llms["local"] == OpenAiLlm(model="llama3.2", base_url="http://127.0.0.1:11434/v1")
    assert reference.agents["assistant"] == LlmAgent()


def test_every_key_is_explained() -> None:
    keys = describe()
    assert len({key.path for key in keys}) == len(keys)
    assert all(key.doc and key.type for key in keys)
    ports = [key for key in keys if key.path == "server.port"]
    assert ports == [("server.port", "an integer from 0 to 65535", "8080", "TCP port; 0: any free one.")]
    assert {"llms.NAME.api_key", "agents.ID.function", "auth.tokens[].token", "server.tls.cert"} <= {
        key.path for key in keys
    }


def test_the_hypercorn_file_names_only_what_hypercorn_knows() -> None:
    import tomllib

    from hypercorn.config import Config

    path = CONFIGS / "hypercorn.toml"
    with path.open("rb") as file:
        assert all(hasattr(Config, key) for key in tomllib.load(file))
    config = Config.from_toml(path)
    assert (config.worker_class, config.bind, config.alpn_protocols) == ("trio", ["127.0.0.1:8080"], ["http/1.1"])


def test_reading_settings_without_a_file_needs_no_yaml() -> None:
    script = (
        "import sys, hector_trio.config as c; c.default_settings({'HECTOR_SERVER_PORT': '1'});"
        "print(sorted({'yaml', 'difflib', 'trio', 'quart'} & set(sys.modules)))"
    )
    environ = {**os.environ, "PYTHONPATH": str(CONFIGS.parent)}
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environ)
    assert out.stdout.strip() == "[]"
