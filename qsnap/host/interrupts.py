"""Signals that end programs: what is under way is cancelled, and so undone in good order.

KeyboardInterrupt by itself comes between any two instructions, those that undo among them. It is lost in a callback
that may not raise, and trio-asyncio never ends where it comes while a loop is opened.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import trio

from qsnap.host.tasks import one_error

P = ParamSpec("P")
T = TypeVar("T")


async def until_signal(function: Callable[[], Awaitable[T]], *numbers: signal.Signals) -> T:
    """Run the function to its end. The first of these signals cancels it, and KeyboardInterrupt is raised then.

    For the main thread only.
    """
    result: list[T] = []
    work = trio.CancelScope()

    async def cancel_at_signal(signals: AsyncIterator[int]) -> None:
        async for _ in signals:
            work.cancel()

    with trio.open_signal_receiver(*numbers) as signals, one_error():
        async with trio.open_nursery() as nursery:
            nursery.start_soon(cancel_at_signal, signals)  # to the end: more of them change nothing
            with work:
                result.append(await function())
            nursery.cancel_scope.cancel()
    if not result:
        raise KeyboardInterrupt
    return result[0]


def interruptible(function: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Have Ctrl-C cancel it where trio would raise KeyboardInterrupt anywhere, which is raised once it is undone."""

    @wraps(function)
    async def call(*args: P.args, **kwargs: P.kwargs) -> T:
        await trio.lowlevel.checkpoint()  # an interrupt that came before is raised here
        if not _raises_anywhere():  # looked at last: of two that begin at once only one changes it
            return await function(*args, **kwargs)
        return await until_signal(partial(function, *args, **kwargs), signal.SIGINT)

    return call


def _raises_anywhere() -> bool:
    """Whether this is trio's way with SIGINT, and no program's own."""
    handler = signal.getsignal(signal.SIGINT)
    ours = threading.current_thread() is threading.main_thread()
    return ours and getattr(handler, "__module__", "") == "trio._core._ki"
