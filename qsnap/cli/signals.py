"""Ctrl-C and its like: what a command has begun is undone in good order."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TypeVar

import click
import trio

from qsnap.host.tasks import one_error

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
    """Run the function to its end. A signal cancels it, and click.Abort is raised.

    KeyboardInterrupt would come between any two instructions, those that undo among them; and it is lost in a callback
    that may not raise.
    """
    return trio.run(_until_signal, function)


async def _until_signal(function: Callable[[], Awaitable[T]]) -> T:
    heeded = [number for number in ENDING if signal.getsignal(number) is not signal.SIG_IGN]
    result: list[T] = []
    work = trio.CancelScope()

    async def cancel_at_signal(signals: AsyncIterator[int]) -> None:
        async for _ in signals:
            work.cancel()

    with trio.open_signal_receiver(*heeded) as signals, one_error():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel_at_signal, signals)  # to the end: more of them change nothing
            with work:
                result.append(await function())
            nursery.cancel_scope.cancel()
    if not result:
        raise click.Abort
    return result[0]
