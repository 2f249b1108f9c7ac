"""What the type of a key says: whether it may be absent, which structs it may be, and its name in words."""

from __future__ import annotations

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from msgspec import Meta, Struct


def without_none(tp: Any) -> tuple[Any, bool]:
    """``X | None`` as X and True; any other type as itself and False."""
    if NoneType in get_args(tp):
        return next(arg for arg in get_args(tp) if arg is not NoneType), True
    return tp, False


def variants_of(tp: Any) -> list[Any]:
    """The structs a value of this type may be; none for anything but structs and unions of them."""
    members = get_args(tp) if get_origin(tp) in (Union, UnionType) else (tp,)
    return list(members) if all(isinstance(cls, type) and issubclass(cls, Struct) for cls in members) else []


def words(tp: Any) -> str:
    """A type, in words."""
    inner, optional = without_none(tp)
    if optional:
        return f"{words(inner)}, or nothing"
    if get_origin(inner) is Literal:
        return f"one of {', '.join(map(str, get_args(inner)))}"
    if get_origin(inner) is list:
        variants = variants_of(get_args(inner)[0])
        return f"a list of {'mappings' if variants else 'texts'}"
    if get_origin(inner) is dict or variants_of(inner):
        return "a mapping"
    meta = next((each for each in get_args(inner)[1:] if isinstance(each, Meta)), Meta())
    plain = get_args(inner)[0] if get_origin(inner) is Annotated else inner
    name = {str: "text", bool: "true or false", int: "an integer", float: "a number"}[plain]
    if meta.gt is not None and meta.le is not None:
        return f"{name} above {meta.gt} and at most {meta.le}"
    if meta.ge is not None and meta.le is not None:
        return f"{name} from {meta.ge} to {meta.le}"
    return name
