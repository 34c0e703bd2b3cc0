"""The public names: each is there, and is found where the package says it is."""

from __future__ import annotations

import qsnap


def test_every_public_name_is_there() -> None:
    for name in qsnap.__all__:
        assert getattr(qsnap, name).__name__ == name
    assert dir(qsnap) == sorted(set(qsnap.__all__))


def test_another_name_is_not() -> None:
    assert not hasattr(qsnap, "no_such_name")


def test_errors_have_exit_codes_of_their_own() -> None:
    errors = [getattr(qsnap, name) for name in qsnap.__all__ if name.endswith("Error")]
    codes = [error.exit_code for error in errors]
    assert len(set(codes)) == len(codes)
    assert not {0, 2} & set(codes)
