"""Where the keys of a TOML text stand, so that an error can name a line.

`tomllib` forgets lines. This walks the tokens of a text that `tomllib` has already accepted, and therefore
checks nothing itself; it runs only once there is an error to report.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator

Key = tuple[str | int, ...]  #: ("vm", "web", "nics", 0, "mac") is shown as vm.web.nics[0].mac

_TOKEN = re.compile(
    r'''"""(?:\\.|[^\\])*?"{3,5} | \'\'\'.*?'{3,5} | "(?:\\.|[^"\\\n])*" | '[^'\n]*'
    | \#[^\n]* | [ \t\r]+ | [^\s\#"'\[\]{}=,.]+ | [\[\]{}=,.\n]''',
    re.VERBOSE | re.DOTALL,
)


class KeyLines:
    """The line of each key, table and array element of a TOML text that is known to be valid.

    Attributes:
        found: place -> line, counted from 1.
    """

    def __init__(self, text: str) -> None:
        self.found: dict[Key, int] = {}
        self._array_tables: dict[Key, int] = {}  # elements seen so far of each [[array]]
        self._tokens = [*_tokens(text), ("\n", 0)]
        self._at = 0
        try:
            self._walk()
        except (IndexError, RecursionError):
            return  # nested beyond reason: what was found so far has to do

    def line_of(self, key: Key) -> int:
        """The line of `key`, or of the closest thing around it; 0 if there is none."""
        around = (key[:length] for length in range(len(key), 0, -1))
        return next((self.found[place] for place in around if place in self.found), 0)

    def _walk(self) -> None:
        table: Key = ()
        while self._at < len(self._tokens):
            if self._take("["):
                table = self._header()
            elif not self._take("\n"):
                self._pair(table)

    def _take(self, mark: str) -> bool:
        taken = self._tokens[self._at][0] == mark
        self._at += taken
        return taken

    def _name(self) -> str:
        name = self._tokens[self._at][0]
        self._at += 1
        return str(tomllib.loads(f"name = {name}")["name"]) if name[0] in "\"'" else name

    def _dotted_key(self) -> tuple[list[str], int]:
        line = self._tokens[self._at][1]
        names = [self._name()]
        while self._take("."):
            names.append(self._name())
        return names, line

    def _header(self) -> Key:
        is_array = self._take("[")
        names, line = self._dotted_key()
        self._at += 2 if is_array else 1
        table: Key = ()
        for name in names:
            if table in self._array_tables:
                table = (*table, self._array_tables[table] - 1)
            table = (*table, name)
            self.found.setdefault(table, line)
        if is_array:
            index = self._array_tables.get(table, 0)
            self._array_tables[table] = index + 1
            table = (*table, index)
            self.found[table] = line
        return table

    def _pair(self, table: Key) -> None:
        names, line = self._dotted_key()
        self._take("=")
        for name in names:
            table = (*table, name)
            self.found.setdefault(table, line)
        self._value(table)

    def _value(self, key: Key) -> None:
        if self._take("["):
            self._elements(key)
        elif self._take("{"):
            while not self._take("}"):
                if not (self._take("\n") or self._take(",")):
                    self._pair(key)
        else:
            self._at += 1
            while self._tokens[self._at][0] not in ("\n", ",", "]", "}"):
                self._at += 1

    def _elements(self, key: Key) -> None:
        index = 0
        while not self._take("]"):
            if not (self._take("\n") or self._take(",")):
                self.found[(*key, index)] = self._tokens[self._at][1]
                self._value((*key, index))
                index += 1


def dotted(key: Key) -> str:
    """`key` as a person would write it: `vm.web.nics[0].mac`."""
    text = ""
    for part in key:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            bare = re.fullmatch(r"[A-Za-z0-9_-]+", part)
            text += ("." if text else "") + (part if bare else f'"{part}"')
    return text


def parse_dotted(text: str) -> Key:
    """The reverse of `dotted`, for keys that need no quotes."""
    words = re.findall(r"\[([0-9]+)\]|([^.\[\]]+)", text)
    return tuple(int(index) if index else word for index, word in words)


def _tokens(text: str) -> Iterator[tuple[str, int]]:
    line = 1
    for match in _TOKEN.finditer(text):
        token = match[0]
        if token[0] not in "# \t\r":
            yield token, line
        line += token.count("\n")
