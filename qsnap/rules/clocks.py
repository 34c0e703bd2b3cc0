"""How far the clocks of two hosts are apart, from messages that went there and back (NTP: RFC 5905, section 8)."""

from __future__ import annotations

from collections.abc import Iterable

from attrs import frozen


@frozen
class Exchange:
    """One message and its answer: when each left and arrived, by the clock of the host that it left from or came to."""

    sent_s: float
    received_s: float
    answered_s: float
    returned_s: float

    @property
    def delay_s(self) -> float:
        """What both ways took together."""
        return (self.returned_s - self.sent_s) - (self.answered_s - self.received_s)

    @property
    def offset_s(self) -> float:
        """What the sender's clock shows more than the other's, off by half the delay at most."""
        return ((self.sent_s - self.received_s) + (self.returned_s - self.answered_s)) / 2


def clock_offset_s(exchanges: Iterable[Exchange]) -> float:
    """What the sender's clock shows more: by the quickest exchange, whose error is the least."""
    return min(exchanges, key=lambda exchange: exchange.delay_s).offset_s
