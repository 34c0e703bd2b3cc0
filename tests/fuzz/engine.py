"""python -m tests.fuzz.engine TARGET [OPTIONS OF LIBFUZZER, CORPORA]: let atheris look for inputs that fail `check`."""

from __future__ import annotations

import importlib
import json
import random
import sys
from collections.abc import Iterator
from typing import Any

import atheris

ODD_NUMBERS = (0, -1, 1 << 64, 10**400, 1.5, float("nan"), float("inf"))
ODD_VALUES: tuple[Any, ...] = (*ODD_NUMBERS, None, True, "", "x", "\0", "\ud800", [], {}, [[]])
BYTEWISE = 0.2  #: share of the changes to lines of JSON that are made without regard to it
LINEWISE = 0.2


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change bytes as libFuzzer thinks best; but where a line is JSON, mostly its values or its place."""
    dice = random.Random(seed)
    lines = data.split(b"\n")
    number = dice.randrange(len(lines))
    mark = lines[number][:1].strip(b"[{")
    value = parsed(lines[number].removeprefix(mark))
    if not value or dice.random() < BYTEWISE:
        return bytes(atheris.Mutate(data, max_size))
    if dice.random() < LINEWISE:
        moved = lines[number] if dice.random() < 0.5 else lines.pop(number)
        lines.insert(dice.randint(0, len(lines)), moved)
    else:
        change(value, dice)
        lines[number] = mark + json.dumps(value).encode()
    return b"\n".join(lines)[:max_size]


def parsed(line: bytes) -> dict[str, Any] | list[Any] | None:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) else None


def change(value: dict[str, Any] | list[Any], dice: random.Random) -> None:
    """Remove one value, or put another in its place: an odd one, or one from elsewhere in the document."""
    places = list(places_in(value))
    container, key = dice.choice(places)
    other, other_key = dice.choice(places)
    match dice.randrange(3):
        case 0:
            del container[key]
        case 1:
            container[key] = dice.choice(ODD_VALUES)
        case 2:
            container[key] = json.loads(json.dumps(other[other_key]))


def places_in(value: Any) -> Iterator[tuple[Any, Any]]:
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    for key in keys:
        yield value, key
        yield from places_in(value[key])


target = sys.argv.pop(1)
with atheris.instrument_imports(include=["qsnap", "qemu", "tomllib"]):
    module = importlib.import_module(f"tests.fuzz.{target}")
atheris.Setup(sys.argv, module.check, custom_mutator=mutate)
atheris.Fuzz()
