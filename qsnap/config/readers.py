"""Readers: functions of (source, place, value) that return the value converted, or raise `ConfigError`.

A reader is given the place of a value as well as the value, so that whatever it finds wrong is reported where
it was written. Some here are readers; others make a reader out of a rule, such as `whole(1, 255)`.
"""

from __future__ import annotations

import posixpath
import re
import tomllib
from collections.abc import Callable, Collection, Iterable
from difflib import get_close_matches
from enum import Enum
from typing import Any, TypeVar

from attrs import frozen

from qsnap.config.key_lines import Key, KeyLines, dotted
from qsnap.errors import ConfigError

T = TypeVar("T")
E = TypeVar("E", bound=Enum)

MEMORY_STEP_BYTES = 2 << 20  #: a huge page of x86: memory of this granularity fits every backing
MEMORY_LIMIT_BYTES = 16 << 40

_SIZE = re.compile(r"([0-9]{1,15})([KMGT]?)", re.IGNORECASE)
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_TYPE_NAMES = {dict: "a table", list: "an array", str: "a string", bool: "a boolean", int: "a whole number"}


@frozen
class Source:
    """What a reader needs besides the value: the text it comes from, and the networks it may name."""

    text: str
    file: str
    base_dir: str
    networks: tuple[str, ...] = ()

    def error(self, key: Key, message: str, advice: str = "") -> ConfigError:
        """A `ConfigError` for the value at `key`."""
        return ConfigError(message, file=self.file, line=self.line_of(key), key=dotted(key), advice=advice)

    def line_of(self, key: Key) -> int:
        """The line of `key`, or of the closest thing around it."""
        return KeyLines(self.text).line_of(key)


Reader = Callable[[Source, Key, object], T]


def parse_toml(source: Source) -> dict[str, Any]:
    """The text as `tomllib` reads it."""
    try:
        return tomllib.loads(source.text)
    except RecursionError:
        raise ConfigError("nested too deeply", file=source.file, line=0, key="") from None
    except ValueError as error:  # TOMLDecodeError, and numbers of too many digits
        place = re.search(r" \(at line ([0-9]+), column [0-9]+\)$", str(error))
        message = str(error)[: place.start()] if place else str(error)
        line = int(place[1]) if place else source.text.rstrip("\n").count("\n") + 1
        raise ConfigError(f"not valid TOML: {message}", file=source.file, line=line, key="") from None


def shown(value: object) -> str:
    """`value` for a message: short, whatever it is."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"a number of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def nearest(word: str, valid: Collection[str]) -> str:
    """Advice for a word that is none of the `valid` ones."""
    close = get_close_matches(word, valid, n=1)
    hint = f"Did you mean `{close[0]}`? " if close else ""
    return f"{hint}Valid: {', '.join(valid) if valid else 'none'}."


def typed(source: Source, key: Key, value: object, wanted: type[T]) -> T:
    """`value` if it is of the TOML type `wanted`; a boolean is not a whole number."""
    if isinstance(value, wanted) and not isinstance(value, bool):
        return value
    found = _TYPE_NAMES.get(type(value), f"a {type(value).__name__}")
    raise source.error(key, f"must be {_TYPE_NAMES[wanted]}, not {found}")


def table(source: Source, key: Key, value: object, valid: Collection[str]) -> dict[str, object]:
    """A table that has no other keys than the `valid` ones."""
    content: dict[str, object] = typed(source, key, value, dict)
    for word in content:
        if word not in valid:
            raise source.error((*key, word), "unknown key", nearest(word, valid))
    return content


def required(source: Source, key: Key, content: dict[str, object], word: str, example: str) -> object:
    """The value of a key that must be given."""
    if word not in content:
        raise source.error((*key, word), "is required and missing", f"For example: {example}")
    return content[word]


def string(source: Source, key: Key, value: object) -> str:
    """Any string that can be an argument of a program."""
    text = typed(source, key, value, str)
    if "\0" in text:
        raise source.error(key, "must not contain a NUL character")
    return text


def matching(pattern: str, rule: str) -> Reader[str]:
    """A reader of strings that match `pattern` as a whole; `rule` says in words what that is."""
    compiled = re.compile(pattern)

    def read(source: Source, key: Key, value: object) -> str:
        text = string(source, key, value)
        if not compiled.fullmatch(text):
            raise source.error(key, f"{shown(text)} is not {rule}")
        return text

    return read


NAME = r"[a-z0-9][a-z0-9-]{0,31}"
name = matching(NAME, "a name: 1 to 32 of a-z, 0-9 and -, not starting with -")


def one_of(valid: Collection[str]) -> Reader[str]:
    """A reader of strings out of a list."""

    def read(source: Source, key: Key, value: object) -> str:
        text = string(source, key, value)
        if text not in valid:
            raise source.error(key, f"unknown value {shown(text)}", nearest(text, valid))
        return text

    return read


def member(members: Iterable[E]) -> Reader[E]:
    """A reader of the values of an enum, as strings."""
    by_value = {str(each.value): each for each in members}
    read = one_of(by_value)
    return lambda source, key, value: by_value[read(source, key, value)]


def whole(low: int, high: int) -> Reader[int]:
    """A reader of whole numbers from `low` to `high`, both included."""

    def read(source: Source, key: Key, value: object) -> int:
        number = typed(source, key, value, int)
        if not low <= number <= high:
            raise source.error(key, f"{shown(number)} is not between {low} and {high}")
        return number

    return read


def tuple_of(read: Reader[T]) -> Reader[tuple[T, ...]]:
    """A reader of arrays, each element of which `read` reads."""

    def read_all(source: Source, key: Key, value: object) -> tuple[T, ...]:
        items: list[object] = typed(source, key, value, list)
        return tuple(read(source, (*key, index), item) for index, item in enumerate(items))

    return read_all


def path(source: Source, key: Key, value: object) -> str:
    """A path, resolved against the description's directory. An empty one stays empty: no such file."""
    text = string(source, key, value)
    return posixpath.normpath(posixpath.join(source.base_dir, text)) if text and source.base_dir else text


def memory(source: Source, key: Key, value: object) -> int:
    """A size in bytes, of whole huge pages: `"512M"`, or a number of bytes."""
    if not isinstance(value, str):
        value = str(whole(0, 1 << 63)(source, key, value))
    match = _SIZE.fullmatch(value)
    if not match:
        advice = 'Write a whole number with K, M, G or T, such as "512M".'
        raise source.error(key, f"{shown(value)} is not a size", advice)
    size_bytes = int(match[1]) * _UNITS[match[2].upper()]
    if not MEMORY_STEP_BYTES <= size_bytes <= MEMORY_LIMIT_BYTES:
        advice = "" if match[2] else f'A number without unit is in bytes. Did you mean "{match[1]}M"?'
        raise source.error(key, f"{size_bytes} bytes is not between 2 MiB and 16 TiB", advice)
    if size_bytes % MEMORY_STEP_BYTES:
        below = size_bytes // MEMORY_STEP_BYTES * 2
        message = f"{size_bytes} bytes is not a multiple of 2 MiB, the size of a huge page"
        raise source.error(key, message, f'Take "{below}M" or "{below + 2}M".')
    return size_bytes
