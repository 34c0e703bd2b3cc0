"""JSON from others, taken for no more than it says: nothing is converted, left out, or given twice."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any, TypeVar

from cattrs import Converter, transform_error

T = TypeVar("T")


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object that `data` is. ValueError says why it is none."""
    try:
        document = json.loads(
            data.decode(), object_pairs_hook=_without_repeats, parse_float=_finite, parse_constant=_finite
        )
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError("no JSON object")
    return document


def structure(converter: Converter, value: object, kind: type[T], *, path: str) -> T:
    """The value of class `kind` that the JSON `value`, found at `path`, stands for. ValueError names what is wrong."""
    try:
        return converter.structure(value, kind)
    except Exception as error:  # cattrs groups what it finds; a hostile value can make it raise nearly anything
        raise ValueError("; ".join(transform_error(error, path=path))[:400]) from None


def make_converter() -> Converter:
    """A converter between attrs classes and JSON values that takes exactly the keys and the types of a class."""
    converter = Converter(forbid_extra_keys=True)
    for kind in (str, int, bool):
        converter.register_structure_hook(kind, exactly(kind))
    converter.register_structure_hook(float, exactly(float, int))
    return converter


def exactly(kind: type[T], *accepted: type) -> Callable[[Any, Any], T]:
    """A cattrs hook that takes a JSON value of the right type only, where cattrs would convert."""

    def structure(value: Any, _: Any) -> T:
        if type(value) not in (kind, *accepted):
            raise ValueError(f"must be {kind.__name__}, not {type(value).__name__}")
        return kind(value)  # type: ignore[call-arg]

    return structure


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key is given twice in one object")
    return content


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is out of range")
    return number
