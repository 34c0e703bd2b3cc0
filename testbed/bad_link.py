"""Run as a program: carries frames between two interfaces of its namespace, late, and not all of them.

Packets are what is lost, so that TCP has to notice by itself; the kernel's own way to do this (netem) is a module that
not every kernel has. It ends with its standard input, and says a word when it has begun.
"""

from __future__ import annotations

import random
import select
import socket
import sys
import time
from collections import deque
from contextlib import suppress

ETH_P_ALL = 3  # linux/if_ether.h
FRAME_BYTES = 1 << 16


def carry(left: str, right: str, delay_s: float, loss: float, seed: int) -> None:
    """Carry frames both ways. Each is lost with the probability `loss`, or else comes out `delay_s` later, in order."""
    lose = random.Random(seed)
    ends = [_open(name) for name in (left, right)]
    beyond = dict(zip(ends, reversed(ends), strict=True))
    waiting: deque[tuple[float, socket.socket, bytes]] = deque()
    print("carrying", flush=True)
    while True:
        until_next_s = max(waiting[0][0] - time.monotonic(), 0) if waiting else None
        ready, _, _ = select.select([*ends, sys.stdin], [], [], until_next_s)
        if sys.stdin in ready:
            return
        for end in set(ends).intersection(ready):
            with suppress(OSError):  # the cable was pulled
                frame = end.recv(FRAME_BYTES)
                if lose.random() >= loss:
                    waiting.append((time.monotonic() + delay_s, beyond[end], frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, out, frame = waiting.popleft()
            with suppress(OSError):
                out.send(frame)


def _open(name: str) -> socket.socket:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    end.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    end.bind((name, ETH_P_ALL))
    return end


if __name__ == "__main__":
    carry(sys.argv[1], sys.argv[2], float(sys.argv[3]), float(sys.argv[4]), int(sys.argv[5]))
