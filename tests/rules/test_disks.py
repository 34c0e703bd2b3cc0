"""The choice of how a disk is kept, over all facts."""

from __future__ import annotations

from itertools import product

import pytest

from qsnap.errors import EngineRefusedError
from qsnap.model import DiskEngine
from qsnap.rules.disks import DiskFacts, choose_disk_engine

NO_CLONES, NO_VOLUME, NO_ROOM = "it cannot clone", "it is no volume", "there is no room"
ALL_FACTS = [
    DiskFacts("VM alice", owned, reflink, lvm, copy)
    for owned, reflink, lvm, copy in product((True, False), ("", NO_CLONES), ("", NO_VOLUME), ("", NO_ROOM))
]


@pytest.mark.parametrize("facts", ALL_FACTS, ids=str)
def test_auto(facts: DiskFacts) -> None:
    """A file of qsnap's own gets an overlay; a file of the user's is cloned, or else copied, or else refused."""
    if facts.owned:
        assert choose_disk_engine(DiskEngine.AUTO, facts).engine is DiskEngine.OVERLAY
    elif not facts.reflink_refusal:
        assert choose_disk_engine(DiskEngine.AUTO, facts).engine is DiskEngine.REFLINK
    elif not facts.lvm_refusal:
        assert choose_disk_engine(DiskEngine.AUTO, facts).engine is DiskEngine.LVM
    elif not facts.copy_refusal:
        chosen = choose_disk_engine(DiskEngine.AUTO, facts)
        assert chosen.engine is DiskEngine.COPY
        assert NO_CLONES in chosen.reason
    else:
        with pytest.raises(EngineRefusedError) as caught:
            choose_disk_engine(DiskEngine.AUTO, facts)
        assert NO_CLONES in caught.value.message
        assert NO_VOLUME in caught.value.message
        assert NO_ROOM in caught.value.message


@pytest.mark.parametrize("facts", ALL_FACTS, ids=str)
@pytest.mark.parametrize("wish", [each for each in DiskEngine if each is not DiskEngine.AUTO])
def test_a_wish_is_met_or_refused_with_a_way_out(wish: DiskEngine, facts: DiskFacts) -> None:
    possible = {
        DiskEngine.OVERLAY: facts.owned,
        DiskEngine.REFLINK: not facts.reflink_refusal,
        DiskEngine.LVM: not facts.lvm_refusal,
        DiskEngine.COPY: not facts.copy_refusal,
    }
    if possible[wish]:
        assert choose_disk_engine(wish, facts).engine is wish
        return
    with pytest.raises(EngineRefusedError, match=f"{wish.value}: ") as caught:
        choose_disk_engine(wish, facts)
    assert caught.value.where == "VM alice"
    assert "--disks" in caught.value.advice
