"""Descriptions of VNEs: read, or ConfigError that points into the text."""

from __future__ import annotations

from qsnap.config import files_of, missing_file_error, parse_description
from qsnap.errors import ConfigError


def check(data: bytes) -> None:
    text = data.decode(errors="replace")
    try:
        vne = parse_description(text, file="vne.toml", base_dir="/images")
        for key, path in files_of(vne):
            check_line(missing_file_error(text, "vne.toml", key, path), text)
    except ConfigError as error:
        check_line(error, text)


def check_line(error: ConfigError, text: str) -> None:
    assert 0 <= error.line <= text.count("\n") + 1
