"""One operation on a VNE in a process of its own, which kills itself at a given step.

    python -m tests.live.killing N RUN STORE OPERATION ARGUMENTS...

A step is whatever reaches out of the process: a command to a QEMU, a change of a network, a file written, a process
started or ended. Right before the N-th of them the process gets SIGKILL; what lies between two steps changes nothing
outside. With N = 0 it lives, and prints the steps in their order.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import trio

import qsnap
from qsnap.host import (
    bridges,
    daemon,
    disks,
    hugepages,
    journal,
    qmp,
    restoring,
    runtime,
    starting,
    takedown,
)
from qsnap.host.store import Store

STEPS: tuple[tuple[Any, str], ...] = (
    (journal.Journal, "_write"),
    (journal.Journal, "end"),
    (runtime.Runtime, "save"),
    (runtime.Runtime, "forget"),
    (runtime.Runtime, "make_vm_directory"),
    (hugepages.HugePages, "_save"),
    (qmp.Qmp, "execute_all"),
    (qmp.Qmp, "send_fd"),
    (bridges.Links, "apply"),
    (bridges.PreparedMoves, "apply"),
    (daemon.Daemon, "wait_ready"),
    (daemon.Daemon, "wait_tracking"),
    (daemon.Daemon, "wait_done"),
    (disks.cut, "create_overlay"),
    (disks.cut, "create_empty"),
    (starting, "create_overlay"),
    (disks.DiskCut, "commands"),
    (Store, "begin"),
    (Store, "keep_file"),
    (Store, "seal_file"),
    (Store, "_seal_all"),
    (Store, "commit"),
    (Store, "_forget"),
    (Store, "collect"),
    (starting, "make_netns"),
    (starting, "remove_netns"),
    (starting, "start_qemu"),
    (takedown, "end_process"),
    (takedown, "remove_netns"),
    (restoring, "fill_memory"),
)
"""What is counted, where it is looked up."""


class Killer:
    """Counts the steps, and kills its own process before one of them."""

    def __init__(self, fatal: int) -> None:
        self.fatal = fatal
        self.steps: list[str] = []

    def begin(self, step: str) -> None:
        """Take note of a step that begins now."""
        self.steps.append(step)
        if len(self.steps) == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(self, owner: Any, name: str) -> None:
        """Count the calls of one function."""
        function = getattr(owner, name)

        @wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            commands = [word[0] for word in args if isinstance(word, tuple) and word and isinstance(word[0], str)]
            self.begin(f"{name} {'+'.join(commands)}".strip())
            return function(*args, **kwargs)

        setattr(owner, name, watched)


def main(fatal: str, run: str, store: str, operation: str, *arguments: str) -> None:
    killer = Killer(int(fatal))
    for owner, name in STEPS:
        killer.watch(owner, name)
    place = qsnap.Place(run, store)
    kinds: dict[str, Callable[[str], Any]] = {
        "engine": qsnap.Engine,
        "cut": qsnap.Cut,
        "disks": qsnap.DiskEngine,
        "ram": qsnap.RamMode,
    }
    options = [word.split("=") for word in arguments if "=" in word]
    settings = {key: kinds[key](value) for key, value in options}
    words: list[Any] = [word for word in arguments if "=" not in word]
    if operation == "up":
        words = [qsnap.load_description(*words)]
    function: Callable[..., Any] = getattr(qsnap, operation)
    trio.run(partial(function, *words, place=place, **settings))
    print("\n".join(killer.steps))


if __name__ == "__main__":
    main(*sys.argv[1:])
