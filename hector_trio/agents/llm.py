"""An agent that is a model: the conversation goes in as turns, the model's deltas come out as chunks."""

from __future__ import annotations

from typing import Any, Final

import msgspec
from msgspec import UNSET, Struct, UnsetType

from hector_trio.agents import AgentInfo, Context
from hector_trio.errors import RunError
from hector_trio.models import Message
from hector_trio.providers import Delta, ModelRequest, Provider, Turn
from hector_trio.uploads import UploadedFile


class Sampling(Struct, frozen=True, omit_defaults=True):
    """The parameters of a model that a caller may set; anything else in a request's ``parameters`` is not passed on."""

    temperature: float | UnsetType = UNSET
    top_p: float | UnsetType = UNSET
    max_tokens: int | UnsetType = UNSET
    max_completion_tokens: int | UnsetType = UNSET
    stop: str | list[str] | UnsetType = UNSET
    seed: int | UnsetType = UNSET
    presence_penalty: float | UnsetType = UNSET
    frequency_penalty: float | UnsetType = UNSET


UPLOAD_BYTES: Final = 1 << 20
"""How long an uploaded text may be for a model."""

_NAMES = frozenset(Sampling.__struct_fields__)
_LIMITS = ("max_tokens", "max_completion_tokens")


def sampling(parameters: dict[str, Any]) -> dict[str, Any]:
    """What of a request's ``parameters`` goes to the model. ``null`` counts as not given.

    Raises RunError (``invalid_parameters``) for a value of the wrong type or a length that is not positive.
    """
    given = {name: value for name, value in parameters.items() if name in _NAMES and value is not None}
    try:
        msgspec.convert(given, Sampling)
    except msgspec.ValidationError as error:
        reason = str(error).replace("`$.", "`parameters.")
        raise RunError("invalid_parameters", f"The parameters do not fit: {reason}") from None
    for name in _LIMITS:
        if given.get(name, 1) < 1:
            raise RunError("invalid_parameters", f"parameters.{name} must be at least 1, not {given[name]}")
    return given


def merged(defaults: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """``defaults`` with ``given`` over them. The two names of the length limit are one: the caller's replaces both."""
    kept = defaults
    if any(name in given for name in _LIMITS):
        kept = {name: value for name, value in defaults.items() if name not in _LIMITS}
    return {**kept, **given}


def as_text(content: Any) -> str:
    """Text as it is, anything else as JSON."""
    return content if isinstance(content, str) else msgspec.json.encode(content).decode()


def turns(instructions: str, history: list[Message], text: str) -> list[Turn]:
    """The conversation as a model is given it. A partial answer stands as far as it came; an empty one is left out,
    because models' servers refuse empty assistant turns."""
    result = [Turn("system", instructions)] if instructions else []
    for message in history:
        if message.role == "user":
            result.append(Turn("user", as_text(message.content)))
        elif message.content not in (None, ""):
            result.append(Turn("assistant", as_text(message.content)))
    result.append(Turn("user", text))
    return result


async def text_of(upload: UploadedFile) -> str:
    """What an uploaded file says. Raises: RunError (``unsupported_upload``) for one that is no text, or too long."""
    kind = upload.media_type.partition(";")[0].strip().lower()
    if not kind.startswith("text/") and not kind.endswith(("/json", "+json", "/xml", "+xml", "/yaml")):
        raise RunError("unsupported_upload", f"The model is given text, and {upload.media_type} is none")
    if upload.size > UPLOAD_BYTES:
        raise RunError("unsupported_upload", f"The model is given {UPLOAD_BYTES} bytes of an upload at most")
    data = bytearray()
    while len(data) < upload.size and (part := await upload.read(len(data), upload.size - len(data))):
        data += part
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise RunError("unsupported_upload", "The upload is not text in UTF-8") from None


class LlmAgent:
    """One model with its instructions. ``parameters`` are the defaults of the model's own parameters.

    An uploaded file stands behind what the input says; it has to be text.
    Emits what the model says as it comes, and after it, only if the provider reported usage, one metadata chunk
    ``{"usage": …, "finishReason": …}``. Raises RunError (``invalid_parameters``) and the provider's ModelError.
    """

    def __init__(self, info: AgentInfo, provider: Provider, instructions: str, parameters: dict[str, Any]) -> None:
        self.info = info
        self._provider = provider
        self._instructions = instructions
        self._parameters = dict(parameters)

    async def run(self, ctx: Context) -> None:
        upload = await ctx.upload()
        text = ctx.text if upload is None else "\n\n".join(filter(None, (ctx.text, await text_of(upload))))
        request = ModelRequest(
            turns=turns(self._instructions, ctx.history, text),
            parameters=merged(self._parameters, sampling(ctx.parameters)),
        )

        async def forward(delta: Delta) -> None:
            if delta.kind == "text":
                await ctx.emit_text(delta.content)
            elif delta.kind == "data":
                await ctx.emit_data(delta.content)
            elif delta.kind == "metadata":
                await ctx.emit_metadata(delta.content)
            else:
                await ctx.emit_error(as_text(delta.content))

        result = await self._provider.stream(request, forward)
        if result.usage:
            await ctx.emit_metadata({"usage": result.usage, "finishReason": result.finish_reason})
