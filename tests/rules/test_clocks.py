"""Clock offsets from exchanged messages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qsnap.rules.clocks import Exchange, clock_offset_s

DELAYS = st.floats(0, 1)


def exchange(ahead_s: float, there_s: float, back_s: float) -> Exchange:
    """One at 100 s of the other's clock, which takes 1 ms to answer."""
    return Exchange(100 - there_s + ahead_s, 100, 100.001, 100.001 + back_s + ahead_s)


@given(st.floats(-1e3, 1e3), DELAYS, DELAYS)
def test_the_error_is_half_the_delay_at_most(ahead_s: float, there_s: float, back_s: float) -> None:
    found = exchange(ahead_s, there_s, back_s)
    assert found.delay_s == pytest.approx(there_s + back_s, abs=1e-9)
    assert abs(found.offset_s - ahead_s) <= found.delay_s / 2 + 1e-9


def test_the_quickest_exchange_counts() -> None:
    exchanges = [exchange(7, 0.3, 0.0), exchange(7, 0.001, 0.002), exchange(7, 0.0, 0.5)]
    assert clock_offset_s(exchanges) == pytest.approx(6.9995 + 0.001, abs=1e-9)
    assert clock_offset_s(exchanges) != pytest.approx(exchanges[0].offset_s)
