"""Runs in a guest: has engines of ipyparallel compute in rounds, each of which needs what all found in the one before.

    rounds.py ROUNDS ENGINES

A line of /srv/rounds is a round: its number, and the SHA-256 of what all engines found.
"""

from __future__ import annotations

import hashlib
import sys

STEPS = 10  #: of an engine in a round
REPEATED = 1000  #: so often an engine is sent a digest, as there is to be something to send
CONNECTION = "/root/.ipython/profile_default/security/ipcontroller-client.json"

state = b""


def begin(number: int) -> None:
    """On an engine: have a state of its own. Engines are numbered as they come, whatever their guests."""
    global state
    state = bytes([number])


def advance(message: bytes, steps: int) -> bytes:
    """On an engine: go on from where it was in the round before."""
    import hashlib

    global state
    for _ in range(steps):
        state = hashlib.sha256(state + message).digest()
    return state


def main() -> None:
    """All rounds."""
    from ipyparallel import Client  # type: ignore[import-not-found]

    rounds, count = map(int, sys.argv[1:])
    client = Client(CONNECTION, timeout=120)
    client.wait_for_engines(count, timeout=120)
    engines = [client[number] for number in client.ids]
    for number, engine in enumerate(engines):
        engine.apply_sync(begin, number)
    digest = b""
    with open("/srv/rounds", "w", buffering=1) as file:
        for number in range(1, rounds + 1):
            answers = [engine.apply_async(advance, digest * REPEATED, STEPS) for engine in engines]
            digest = hashlib.sha256(b"".join(answer.get() for answer in answers)).digest()
            file.write(f"{number} {digest.hex()}\n")
    client.shutdown(hub=True, block=True)


if __name__ == "__main__":
    main()
