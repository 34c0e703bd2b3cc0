"""VNE descriptions: TOML text in, a `VNE` out, or a `ConfigError` that names the line and key at fault.

Nothing is read from disk here: `files_of` tells the caller which files must exist, and `missing_file_error`
words the complaint about one that does not. `docs/description.md` documents every key.
"""

from qsnap.config.description import AGENT_PORT, files_of, missing_file_error, parse_description

__all__ = ["AGENT_PORT", "files_of", "missing_file_error", "parse_description"]
