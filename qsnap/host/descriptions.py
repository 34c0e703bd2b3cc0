"""Reading a VNE description from a file."""

from __future__ import annotations

import os
from pathlib import Path

from qsnap.config import files_of, missing_file_error, parse_description
from qsnap.errors import ConfigError
from qsnap.model import VNE


def load_description(path: str | Path) -> VNE:
    """The VNE that a TOML file describes; relative paths in it are taken from the file's directory.

    Raises ConfigError with the line and key at fault, also for a file named in it that does not exist.
    """
    name = str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        advice = "Name the TOML file that describes the VNE."
        raise ConfigError(f"cannot read it: {reason}", file=name, line=0, key="", advice=advice) from error
    vne = parse_description(text, file=name, base_dir=os.path.dirname(os.path.abspath(path)))
    for key, needed in files_of(vne):
        if vne.hosts:
            continue  # their agents look for it
        if not os.path.exists(needed):
            raise missing_file_error(text, name, key, needed)
        if os.path.isdir(needed):
            raise missing_file_error(text, name, key, needed, "a directory, where a file is needed")
    return vne
