"""Messages between hosts: values <-> JSON, each an object with the name of its class as `type`.

A new message is a class and a place in `Message`. `Hello`, `Welcome` and `Refused` keep their form in all versions and
ignore what they do not know, so that hosts of different versions can say so to each other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import get_args

from attrs import field, frozen
from cattrs.gen import make_dict_structure_fn

from qsnap import errors
from qsnap.errors import ConfigError, IntegrityError, ProtocolError, QsnapError, StreamError
from qsnap.model import (
    VNE,
    Ability,
    AttachReport,
    Outcome,
    RestoreOrder,
    RestoreReport,
    Snapshot,
    SnapshotOrder,
    StateFiles,
    UpOrder,
    VMSnapshot,
    VNEStatus,
)
from qsnap.wire.strict import exactly, make_converter, parse_object, structure

Version = tuple[int, int]  #: major, minor; another major is another protocol, a higher minor has more capabilities

VERSION: Version = (1, 2)
CAPABILITIES: tuple[str, ...] = ("console", "appointment")


@frozen
class Hello:
    """The first message, of the host that connects. `crl` is its certificate revocation list, as PEM."""

    version: Version
    capabilities: tuple[str, ...]
    crl: str


@frozen
class Welcome:
    """The answer to `Hello`."""

    version: Version
    capabilities: tuple[str, ...]
    crl: str


@frozen
class Refused:
    """What was asked for failed: a QsnapError on its way. `details` are the attributes that its class adds."""

    kind: str
    message: str
    where: str = ""
    advice: str = ""
    notes: tuple[str, ...] = ()
    details: Mapping[str, str | int] = field(factory=dict)

    @classmethod
    def of(cls, error: QsnapError) -> Refused:
        """The message for an error. A refinement that is not public goes as what it refines."""
        kind = next(each for each in type(error).__mro__ if each in _PUBLIC)
        details = {name: getattr(error, name) for name in _DETAILS.get(kind, ())}
        notes = tuple(getattr(error, "__notes__", ()))
        return cls(kind.__name__, error.message, error.where, error.advice, notes, details)

    def error(self) -> QsnapError:
        """The error, to be raised on this side. One of a class that is not known here is a QsnapError."""
        kind = next((each for each in _PUBLIC if each.__name__ == self.kind), QsnapError)
        error = kind.__new__(kind)
        QsnapError.__init__(error, self.message, where=self.where, advice=self.advice)
        for name, blank in _DETAILS.get(kind, {}).items():
            value = self.details.get(name)
            setattr(error, name, value if type(value) is type(blank) else blank)
        for note in self.notes:
            error.add_note(note)
        return error


@frozen
class Ping:
    """Nothing but a sign of life."""


@frozen
class ClockProbe:
    """Asks what the time is. `sent_s` is on the clock of the one who asks."""

    sent_s: float


@frozen
class ClockReply:
    """`sent_s` of the probe, and when it came and this left, on the clock of the one who answers."""

    sent_s: float
    received_s: float
    answered_s: float


@frozen
class Begin:
    """Begins a host's part of an operation: just one of these."""

    up: UpOrder | None = None
    snapshot: SnapshotOrder | None = None
    restore: RestoreOrder | None = None

    @classmethod
    def of(cls, order: UpOrder | SnapshotOrder | RestoreOrder) -> Begin:
        """The message for an order."""
        match order:
            case UpOrder():
                return cls(up=order)
            case SnapshotOrder():
                return cls(snapshot=order)
        return cls(restore=order)

    @property
    def order(self) -> UpOrder | SnapshotOrder | RestoreOrder:
        """What is to be done. Raises ProtocolError if that is nothing, or more than one thing."""
        orders = [each for each in (self.up, self.snapshot, self.restore) if each is not None]
        if len(orders) != 1:
            raise ProtocolError(f"Begin has {len(orders)} orders")
        return orders[0]

    @property
    def vne(self) -> str:
        """The VNE that it is about."""
        order = self.order
        return order.vne.name if isinstance(order, UpOrder) else order.vne


@frozen
class Begun:
    """The answer to `Begin`: nothing has been done yet, but nobody else is at work on the VNE."""


@frozen
class Perform:
    """Asks for a phase of the operation: a value of `qsnap.rules.commit.Phase`."""

    phase: str


@frozen
class PerformAt:
    """Asks for a phase that all begin at one moment: `at_s` on the receiver's clock, or at once if that is past."""

    phase: str
    at_s: float


@frozen
class Performed:
    """A phase is done. The last phase of a snapshot yields `vms`."""

    phase: str
    vms: tuple[VMSnapshot, ...] = ()


@frozen
class Commit:
    """All have voted: the part is to last."""

    outcome: Outcome


@frozen
class Committed:
    """It lasts. What it is by now, of the kind that the operation makes."""

    status: VNEStatus | None = None
    snapshot: Snapshot | None = None
    report: RestoreReport | None = None

    @classmethod
    def of(cls, result: VNEStatus | Snapshot | RestoreReport | None) -> Committed:
        """The message for what a commit returned."""
        match result:
            case VNEStatus():
                return cls(status=result)
            case Snapshot():
                return cls(snapshot=result)
        return cls(report=result)

    @property
    def result(self) -> VNEStatus | Snapshot | RestoreReport | None:
        """What the commit returned."""
        return self.status or self.snapshot or self.report


@frozen
class Undo:
    """The part is to be taken back."""


@frozen
class Undone:
    """It is taken back."""


@frozen
class Progressed:
    """How far a phase has come, as `qsnap.host.place.Progress` has it; any number of these precede an answer."""

    stage: str
    vm: str
    done: int
    total: int


@frozen
class Ask:
    """Asks the decider what became of an operation; of a snapshot if it has a name. What is undecided, it undoes."""

    vne: str
    operation: str
    snapshot: str = ""


@frozen
class Answer:
    """The outcome of the operation if it was committed."""

    outcome: Outcome | None = None


@frozen
class GetStatus:
    """Asks for the state of a VNE, as far as it is on the host."""

    vne: str


@frozen
class Statuses:
    """States of VNEs."""

    statuses: tuple[VNEStatus, ...]


@frozen
class TakeDown:
    """Ends what the host has of a VNE."""

    vne: str


@frozen
class GetSnapshots:
    """Asks what the host has of the snapshots of a VNE, or of one."""

    vne: str
    name: str = ""


@frozen
class Verify:
    """Has every file of the host's part of a snapshot read."""

    vne: str
    name: str


@frozen
class Convert:
    """Has the host's part of a recorded snapshot made flat."""

    vne: str
    name: str


@frozen
class Snapshots:
    """Snapshots, as far as the host has them."""

    snapshots: tuple[Snapshot, ...]


@frozen
class Remove:
    """Removes the host's part of a snapshot."""

    vne: str
    name: str


@frozen
class Recover:
    """Has put right what was left of a VNE."""

    vne: str


@frozen
class Names:
    """Names of files or of VNEs."""

    names: tuple[str, ...]


@frozen
class Attach:
    """Attaches to VMs that run on the host: its part of the VNE."""

    part: VNE

    @property
    def vne(self) -> str:
        """The VNE that it is about."""
        return self.part.name


@frozen
class Attached:
    """What it is attached to."""

    report: AttachReport


@frozen
class Detach:
    """Lets go of what the host has of a VNE."""

    vne: str


@frozen
class Done:
    """It is done, and there is nothing to tell."""


@frozen
class GetAbilities:
    """Asks what the host can do with a QEMU."""

    qemu: str


@frozen
class Abilities:
    """What it can do, and the version of qsnap."""

    version: str
    abilities: tuple[Ability, ...]


@frozen
class Fetch:
    """Has the host fetch what it lacks of a snapshot. `sources` are, by VM, the hosts that have of it what this lacks.

    `part` is what is to be restored on the host.
    """

    part: VNE
    name: str
    sources: Mapping[str, tuple[str, ...]]

    @property
    def vne(self) -> str:
        """The VNE that it is about."""
        return self.part.name


@frozen
class Keep:
    """Has the host take in the stream of a VM, for an operation that it takes part in, and keep what it is made into.

    The stream follows as data; the last frame of data is empty. `backed` are the RAMBlocks to become files.
    """

    vne: str
    operation: str
    vm: str
    backed: tuple[str, ...]
    ram_limit_bytes: int
    record_limit_bytes: int | None = None


@frozen
class Keeping:
    """How far the host is with a stream: it is `ready` for it, or is `tracking` (the first RAM record has come)."""

    event: str
    stream_bytes: int = 0


@frozen
class Received:
    """The stream has ended, and is in files: the size of the RAM, and how many pages came that were not zero."""

    ram_bytes: int
    data_pages: int


@frozen
class Kept:
    """The files are durable."""

    files: StateFiles


@frozen
class Hold:
    """What the host is to keep of the VM if the operation is committed. The answer is `Done`."""

    vm: VMSnapshot


@frozen
class GetBase:
    """Asks for a base image that layers of a snapshot lie on, and for what it lies on itself."""

    vne: str
    name: str
    file: str


@frozen
class ImageFile:
    """An image of the user's: its path on the host that was asked, and the SHA-256 of its content."""

    file: str
    format: str
    size_bytes: int
    sha256: str


@frozen
class Base:
    """The images that a disk lies on, the newest first."""

    images: tuple[ImageFile, ...]


@frozen
class ReadFile:
    """Asks for a file of a snapshot from an offset on, or for an image that its layers lie on.

    It comes as data (`qsnap.wire.extents`); the last frame of data is empty.
    """

    vne: str
    name: str
    path: str
    offset: int


@frozen
class OpenConsole:
    """Asks for the serial console of a VM. After `Done`, data goes both ways; a frame of data that is empty ends it."""

    vne: str
    vm: str


Message = (
    Hello
    | Welcome
    | Refused
    | Ping
    | ClockProbe
    | ClockReply
    | Begin
    | Begun
    | Perform
    | PerformAt
    | Performed
    | Commit
    | Committed
    | Undo
    | Undone
    | Progressed
    | Ask
    | Answer
    | GetStatus
    | Statuses
    | TakeDown
    | GetSnapshots
    | Verify
    | Convert
    | Snapshots
    | Remove
    | Recover
    | Names
    | Attach
    | Attached
    | Detach
    | Done
    | GetAbilities
    | Abilities
    | Fetch
    | Keep
    | Keeping
    | Received
    | Kept
    | Hold
    | GetBase
    | Base
    | ReadFile
    | OpenConsole
)

_KINDS: dict[str, type[Message]] = {kind.__name__: kind for kind in get_args(Message)}
_PUBLIC = tuple(each for each in vars(errors).values() if isinstance(each, type) and issubclass(each, QsnapError))
#: What the classes of errors add to QsnapError, blank.
_DETAILS: Mapping[type, Mapping[str, str | int]] = {
    ConfigError: {"file": "", "line": 0, "key": ""},
    IntegrityError: {"file": ""},
    StreamError: {"stream_offset": 0},
}

_converter = make_converter()
_converter.register_structure_hook(
    str | int, lambda value, _: exactly(int)(value, _) if isinstance(value, int) else exactly(str)(value, _)
)
for _lenient in (Hello, Welcome, Refused):
    _converter.register_structure_hook(
        _lenient, make_dict_structure_fn(_lenient, _converter, _cattrs_forbid_extra_keys=False)
    )


def encode_message(message: Message) -> bytes:
    """The JSON of a message."""
    document = {"type": type(message).__name__, **_converter.unstructure(message)}
    return json.dumps(document, allow_nan=False, separators=(",", ":")).encode()


def decode_message(data: bytes) -> Message:
    """The message that `data` is. ProtocolError says why it is none."""
    try:
        document = parse_object(data)
        kind = document.pop("type", None)
        if not isinstance(kind, str) or kind not in _KINDS:
            raise ValueError(f"unknown type {str(kind)[:40]!r}")
        return structure(_converter, document, _KINDS[kind], path=kind)
    except ValueError as error:
        raise ProtocolError(f"not a message: {str(error)[:400]}") from None


def check_version(theirs: Version, *, peer: str, here: str) -> None:
    """Raise ProtocolError if the host `peer` speaks another protocol than this one, which is `here`."""
    if theirs[0] != VERSION[0]:
        spoken, ours = (f"{major}.{minor}" for major, minor in (theirs, VERSION))
        older = peer if theirs < VERSION else here
        message = f"{peer} speaks version {spoken} of the protocol, {here} version {ours}"
        raise ProtocolError(message, advice=f"Upgrade qsnap on {older}.")
