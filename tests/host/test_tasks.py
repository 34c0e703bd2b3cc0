"""Blocks in which nothing else may go first: they overlap, and leave everything as it was."""

from __future__ import annotations

import gc
import os
from contextlib import ExitStack

import pytest

from qsnap.host.tasks import prioritized, uncollected


@pytest.mark.skipif(os.geteuid() != 0, reason="it takes CAP_SYS_NICE")
def test_overlapping_blocks_end_as_if_there_had_been_one() -> None:
    before = os.sched_getscheduler(0)
    first, second = ExitStack(), ExitStack()
    for stack in (first, second):
        stack.enter_context(uncollected())
        stack.enter_context(prioritized())
    first.close()
    assert os.sched_getscheduler(0) & ~os.SCHED_RESET_ON_FORK == os.SCHED_RR
    assert not gc.isenabled()
    second.close()
    assert os.sched_getscheduler(0) == before
    assert gc.isenabled()
