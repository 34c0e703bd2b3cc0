"""What goes over the line to a guest's shell, and what of it is an answer."""

from __future__ import annotations

from base64 import b64decode

import pytest

from testbed.shell import Completed, encode_command, parse_answer, port_arguments

ANSWER = b"abc123 1 =b25l =dHdv ."


def test_a_command_is_one_line_with_an_end() -> None:
    before, line, after = encode_command("abc123", "echo a\necho b", 2.5).split(b"\n")
    tag, limit, text, end = line.split(b" ")
    assert (before, after) == (b"", b"")
    assert (tag, limit, b64decode(text), end) == (b"abc123", b"2.5", b"echo a\necho b", b".")


def test_answer() -> None:
    assert parse_answer(ANSWER, "abc123") == Completed(1, "one", "two")
    assert parse_answer(b"abc123 0 = = .", "abc123") == Completed(0, "", "")


@pytest.mark.parametrize("end", range(len(ANSWER)))
def test_pieces_of_an_answer_are_none(end: int) -> None:
    assert parse_answer(ANSWER[:end], "abc123") is None


def test_the_answer_to_another_command_is_none() -> None:
    assert parse_answer(ANSWER, "abc124") is None


def test_commas_in_a_path_are_doubled_for_qemu() -> None:
    assert "path=/a,,b/s," in port_arguments("/a,b/s")[1]
