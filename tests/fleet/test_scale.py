"""What is said in an operation on several hosts: as much to each, however many they are, and to all at once."""

from __future__ import annotations

import pytest

from bench.scale import ROUND_TRIP_S, VMS, Took, order_for, simulate, spread_vne
from qsnap.model import Snapshot, VNEStatus
from qsnap.rules.commit import SNAPSHOT_COLOUR, START

#: Begin, the phases, COMMIT, and their answers; a snapshot's probes of the clock, and what tells of progress
MESSAGES = {
    "up": 2 + 2 * len(START) + 2 + VMS,
    "snapshot": 2 * 8 + 2 + 2 * len(SNAPSHOT_COLOUR) + 2 + 2 * VMS,
}
#: the same, of which COMMIT takes two: the decider hears of it first
ROUND_TRIPS = {"up": 1 + len(START) + 2, "snapshot": 8 + 1 + len(SNAPSHOT_COLOUR) + 2}


def took(operation: str, hosts: int) -> Took:
    vne = spread_vne(hosts)
    return simulate(order_for(operation, vne), vne)


@pytest.mark.parametrize("operation", ["snapshot", "up"])
@pytest.mark.parametrize("hosts", [2, 40])
def test_messages_and_round_trips_do_not_grow_with_the_hosts(operation: str, hosts: int) -> None:
    found = took(operation, hosts)
    assert found.sent.messages == MESSAGES[operation] * hosts
    assert found.simulated_s == pytest.approx(ROUND_TRIPS[operation] * ROUND_TRIP_S)
    assert isinstance(found.whole, Snapshot | VNEStatus)
    assert len(found.whole.vms) == VMS * hosts


def test_a_snapshot_tells_no_host_of_the_others() -> None:
    few, many = (took("snapshot", hosts).sent.size_bytes / hosts for hosts in (10, 40))
    assert many == pytest.approx(few, rel=0.01)
