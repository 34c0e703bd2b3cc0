"""Ctrl-C and its like: what a command has begun is undone in good order."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

from qsnap.host.interrupts import until_signal

T = TypeVar("T")

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def interrupt_on_signals() -> None:
    """Let being terminated, or the terminal being closed, interrupt whatever it is, as Ctrl-C does."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    for number in ENDING:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, lambda number, frame: signal.raise_signal(signal.SIGINT))


def run_until_signal(function: Callable[[], Awaitable[T]]) -> T:
    """Run the function to its end. A signal cancels it, and KeyboardInterrupt is raised when it is undone."""
    heeded = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    return trio.run(until_signal, function, *heeded)
