"""Configuration: YAML text and an environment mapping become frozen settings; what is wrong is told with its path."""

from hector_trio.config.checks import check_exposure, is_loopback
from hector_trio.config.documentation import Key, describe
from hector_trio.config.environment import Overrides, from_environment, variables_in
from hector_trio.config.loading import default_settings, load, load_file
from hector_trio.config.rules import secrets
from hector_trio.config.settings import (
    A2a,
    A2aExtension,
    A2aSkill,
    AgentSettings,
    Auth,
    DemoLlm,
    Limits,
    Llm,
    LlmAgent,
    Log,
    OpenAiLlm,
    PushSettings,
    PythonAgent,
    Server,
    Settings,
    StoreSettings,
    Tasks,
    Tls,
    Token,
    UploadSettings,
)

__all__ = [
    "A2a",
    "A2aExtension",
    "A2aSkill",
    "AgentSettings",
    "Auth",
    "DemoLlm",
    "Key",
    "Limits",
    "Llm",
    "LlmAgent",
    "Log",
    "OpenAiLlm",
    "Overrides",
    "PushSettings",
    "PythonAgent",
    "Server",
    "Settings",
    "StoreSettings",
    "Tasks",
    "Tls",
    "Token",
    "UploadSettings",
    "check_exposure",
    "default_settings",
    "describe",
    "from_environment",
    "is_loopback",
    "load",
    "load_file",
    "secrets",
    "variables_in",
]
