"""Running things side by side, and reporting one error when they fail."""

from __future__ import annotations

import gc
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TypeVar

import trio

from qsnap.errors import QsnapError

T = TypeVar("T")


async def run_all(calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """Run the calls side by side and return their values in order. The first failure cancels the others."""
    results: dict[int, T] = {}

    async def run(index: int, call: Callable[[], Awaitable[T]]) -> None:
        results[index] = await call()

    with one_error():
        async with trio.open_nursery() as nursery:
            for index, call in enumerate(calls):
                nursery.start_soon(run, index, call)
    return [results[index] for index in range(len(calls))]


async def run_each(calls: Sequence[Callable[[], Awaitable[T]]]) -> list[T]:
    """Run the calls side by side; what fails stops no other, and the first failure is raised when all have ended.

    The values are in the order in which they came.
    """
    failures: list[QsnapError] = []
    results: list[T] = []

    async def run(call: Callable[[], Awaitable[T]]) -> None:
        try:
            results.append(await call())
        except QsnapError as error:
            failures.append(error)

    await run_all([partial(run, call) for call in calls])
    if failures:
        raise failures[0]
    return results


_uncollected: list[None] = []  # one for each block that is open: operations overlap
_usual: list[tuple[int, os.sched_param]] = []  # how the kernel schedules this process outside


@contextmanager
def uncollected() -> Iterator[None]:
    """No garbage is collected inside, but for what no cycle holds."""
    gc.disable()
    _uncollected.append(None)
    try:
        yield
    finally:
        _uncollected.pop()
        if not _uncollected:
            gc.enable()


@contextmanager
def prioritized() -> Iterator[None]:
    """No other program goes first inside, where that is allowed."""
    _usual.append(_usual[0] if _usual else (os.sched_getscheduler(0), os.sched_getparam(0)))
    _schedule(os.SCHED_RR | os.SCHED_RESET_ON_FORK, os.sched_param(1))
    try:
        yield
    finally:
        usual = _usual.pop()
        if not _usual:
            _schedule(*usual)


def _schedule(policy: int, parameters: os.sched_param) -> None:
    with suppress(PermissionError):  # it takes CAP_SYS_NICE
        os.sched_setscheduler(0, policy, parameters)


@contextmanager
def one_error() -> Iterator[None]:
    """Turn the group of errors of a nursery into the one a caller can act on; the others become notes on it."""
    try:
        yield
    except BaseExceptionGroup as group:
        first, *others = sorted(_leaves(group), key=_rank)
        for other in others:
            if isinstance(other, QsnapError) and str(other) != str(first):
                first.add_note(f"also: {other}")
        raise first from first.__cause__


def _leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    return [
        leaf
        for error in group.exceptions
        for leaf in (_leaves(error) if isinstance(error, BaseExceptionGroup) else [error])
    ]


def _rank(error: BaseException) -> int:
    """What the caller should see first: an interrupt, a defect, then what was foreseen, and cancellation last."""
    if isinstance(error, trio.Cancelled):
        return 3
    if isinstance(error, QsnapError):
        return 2
    return 1 if isinstance(error, Exception) else 0
