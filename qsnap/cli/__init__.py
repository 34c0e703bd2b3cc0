"""The command line: parse, call one function of the library, print what it returns."""

from qsnap.cli.run import main

__all__ = ["main"]
