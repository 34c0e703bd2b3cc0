"""Unix time as it was when this process began, counted on by a clock that nobody sets.

QEMU stamps its events with the wall clock, which may be set between two of them. So the age of a stamp is taken when
the event comes, and the event is placed on this clock.
"""

from __future__ import annotations

import time

import trio

PUNCTUAL_S = 2e-3
_BEGAN_S = time.time() - time.monotonic()


def steady_s() -> float:
    """Seconds since the Unix epoch, never set back or forward while this process lives."""
    return _BEGAN_S + time.monotonic()


async def sleep_until(instant_s: float) -> None:
    """Sleep until this instant on the clock of `steady_s`, to a tenth of a millisecond where a processor is free.

    The last PUNCTUAL_S block the thread: the event loop counts in whole milliseconds.
    """
    await trio.sleep(max(0.0, instant_s - steady_s() - PUNCTUAL_S))
    time.sleep(min(PUNCTUAL_S, max(0.0, instant_s - steady_s())))  # noqa: ASYNC251


def place_stamp(stamp_s: float, *, wall_s: float, now_s: float, earliest_s: float) -> float:
    """The instant, on the clock that reads `now_s`, of an event that the clock that reads `wall_s` has stamped.

    Not before `earliest_s`, when the event before it happened, nor yet to come, however the wall clock was set.
    """
    return max(earliest_s, min(now_s, now_s - (wall_s - stamp_s)))
