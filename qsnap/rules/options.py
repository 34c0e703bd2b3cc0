"""QEMU's command line as words: its options, and the two ways in which an option says `key=value`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from attrs import frozen


@frozen
class Properties:
    """What an option says: `driver,key=value` with doubled commas, or JSON. A first bare word is `implied`'s."""

    values: dict[str, Any]
    implied: str
    is_json: bool

    def get(self, key: str) -> str:
        """The value of a key as text; empty where there is none."""
        value = self.values.get(key, "")
        return ("off", "on")[value] if isinstance(value, bool) else str(value)

    def changed(self, **changes: Any) -> Properties:
        """The same with other values; None takes a key away."""
        values = {**self.values, **changes}
        return Properties(
            {key: value for key, value in values.items() if value is not None}, self.implied, self.is_json
        )

    def encode(self) -> str:
        """The text of the option, in the form that it had."""
        if self.is_json:
            return json.dumps(self.values)
        return ",".join(
            escape(value) if key == self.implied and not index else f"{key}={escape(value)}"
            for index, (key, value) in enumerate(self.values.items())
        )


def parse_properties(text: str, implied: str) -> Properties:
    """Raises ValueError for JSON that is none, or no object."""
    if text.startswith("{"):
        values = json.loads(text)
        if not isinstance(values, dict):
            raise ValueError("not a JSON object")
        return Properties(values, implied, is_json=True)
    found: dict[str, Any] = {}
    for index, word in enumerate(re.findall(r"(?:[^,]|,,)+", text)):
        key, equals, value = word.partition("=")
        if not equals and not index and implied:
            key, value = implied, word
        elif not equals:
            value = "on"
        found[key] = value.replace(",,", ",")
    return Properties(found, implied, is_json=False)


def escape(value: object) -> str:
    """A value in which a comma ends nothing."""
    return str(value).replace(",", ",,")


def split_options(words: Sequence[str], flags: frozenset[str]) -> Iterator[tuple[str, str]]:
    """(option without dashes, its argument) in their order. A word that belongs to no option is a disk (-hda)."""
    rest = iter(words)
    for word in rest:
        option = word.removeprefix("-").removeprefix("-")
        if not word.startswith("-") or word == "-":
            yield "hda", word
        else:
            yield option, "" if option in flags else next(rest, "")
