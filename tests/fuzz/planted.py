"""The control: the stream reader with a defect that the corpus does not show. It has to be found."""

from __future__ import annotations

from contextlib import suppress
from unittest.mock import patch

from qsnap.errors import StreamError
from qsnap.wire import stream as reading
from qsnap.wire.cursor import Cursor
from tests.fuzz.stream import small_reader
from tests.wire.folding import fold


class CarelessCursor(Cursor):
    """Lets an IndexError through where a name is long."""

    def counted(self) -> bytes:
        if self.peek() > 200:
            raise IndexError("planted")
        return super().counted()


def check(data: bytes) -> None:
    with patch.object(reading, "Cursor", CarelessCursor), suppress(StreamError):
        fold([data], small_reader())
