"""The journal of one VNE: what is being done to it, written down before it is done.

A file of JSON lines beside the VNE's lock, there only while an operation is under way. Whoever takes the lock and finds
one knows that its writer was killed, and what it had begun (`qsnap.host.recovery`). It is not synced: it has to
outlive a process, not the host, which the VMs do not outlive either.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

from attrs import define, field, frozen
from cattrs.preconf.json import make_converter

from qsnap.errors import HostError
from qsnap.host.disks import DiskPlan
from qsnap.model import Colour

VOTED = "voted"  #: the step of a host that has done all that an operation on several hosts asks of it
ABORTED = "aborted"  #: and has learned that it is to be undone
_converter = make_converter()


class Kind(Enum):
    """What can be done to a VNE."""

    UP = "up"
    RESTORE = "restore"
    DOWN = "down"
    ATTACH = "attach"
    DETACH = "detach"
    SNAPSHOT = "snapshot"
    REMOVE = "rm"
    CONVERT = "convert"


@frozen
class Operation:
    """What is being done, and to which snapshot in which store where it is about one.

    `active` is the colour that the VNE has once a snapshot is committed. `id` is that of an operation on several hosts,
    and `decider` the one of them that knows its outcome, unless that is this one.
    """

    kind: Kind
    snapshot: str = ""
    store: str = ""
    active: Colour | None = None
    id: str = ""
    decider: str = ""


@frozen
class Member:
    """A VM that is about to be captured: whether it ran, and what is about to be done to its disks."""

    vm: str
    running: bool
    disks: DiskPlan


@frozen
class Interrupted:
    """An operation whose process was killed: the VMs it had begun to capture, and the steps it wrote down."""

    operation: Operation
    members: tuple[Member, ...] = ()
    steps: tuple[str, ...] = ()

    @property
    def in_doubt(self) -> bool:
        """Whether another host decides what becomes of it: this one has done its part, and does not know."""
        return bool(self.operation.decider) and VOTED in self.steps and ABORTED not in self.steps


@define
class Journal:
    """The journal at `path`. Each line is complete in the file before the step that it tells of begins."""

    path: Path
    _fd: int = field(default=-1, init=False)

    def read(self) -> Interrupted | None:
        """What was under way; None if nothing was. A line that its writer could not complete does not count."""
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return None
        try:
            entries = [json.loads(line) for line in lines if line.endswith(b"\n")]
            if not entries:
                return None
            operation = _converter.structure(entries[0]["operation"], Operation)
            members = tuple(_converter.structure(entry["member"], Member) for entry in entries if "member" in entry)
            steps = tuple(str(entry["step"]) for entry in entries if "step" in entry)
        except Exception as error:  # see Runtime.load
            advice = "Take the VNE down, which removes it: qsnap down VNE"
            raise HostError("this journal is damaged", where=str(self.path), advice=advice) from error
        return Interrupted(operation, members, steps)

    def begin(self, operation: Operation) -> None:
        """Write down what is about to be done. Raises HostError where it cannot be written, as the others do."""
        self.end()
        self._write(operation=_converter.unstructure(operation))

    def add(self, member: Member) -> None:
        """Write down a VM before anything of it is changed."""
        self._write(member=_converter.unstructure(member))

    def note(self, step: str) -> None:
        """Write down a step that is about to be taken."""
        self._write(step=step)

    def end(self) -> None:
        """The operation has ended, one way or the other, and nothing of it is left to be done."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Close the file; what it says stays."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, **entry: object) -> None:
        line = json.dumps(entry).encode() + b"\n"
        with self._explained():
            if self._fd < 0:
                self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            if os.write(self._fd, line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise HostError(error.strerror or str(error), where=str(self.path), advice="Make room there.") from error
