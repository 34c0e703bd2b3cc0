"""How long counters in the memory of guests stand still, seen by a process of its own that the kernel lets go first.

    python -m bench.watch PATH:ADDRESS ...

says `watching`, looks at the 8-byte words every millisecond until its input ends, and then prints a JSON list of the
longest time for which each did not change, in seconds. A thread of the benchmark's would wait for that process and its
VMs, and take its own waiting for theirs: with four VMs on two processors it stood still for up to 0.4 s.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from contextlib import suppress

LOOK_S = 0.001


def watch(places: list[tuple[int, int]]) -> list[float]:
    """The longest time without a change of each (file descriptor, address), until the input ends."""
    now = time.perf_counter()
    words, since, longest = [b""] * len(places), [now] * len(places), [0.0] * len(places)
    while not select.select([sys.stdin], [], [], LOOK_S)[0]:
        now = time.perf_counter()
        for index, (fd, address) in enumerate(places):
            word = os.pread(fd, 8, address)
            if word != words[index]:
                words[index], since[index] = word, now
            longest[index] = max(longest[index], now - since[index])
    return longest


def main() -> None:
    """Watch what the command line names."""
    with suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(2))  # before qsnap, which asks for 1 in its cut
    pairs = [argument.rsplit(":", 1) for argument in sys.argv[1:]]
    places = [(os.open(path, os.O_RDONLY), int(address)) for path, address in pairs]
    print("watching", flush=True)
    print(json.dumps(watch(places)), flush=True)


if __name__ == "__main__":
    main()
