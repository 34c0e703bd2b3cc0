"""What can go wrong, grouped by whose fault it is.

Every error says what happened, where (file, VM, host, stream offset) and what to do next; `exit_code` is what
the command line ends with. Foreign exceptions are translated at the seam where they arise.
"""

from __future__ import annotations

from typing import ClassVar


class QsnapError(Exception):
    """Base of every error that qsnap raises on purpose.

    Attributes:
        message: what happened.
        where: the VM, file or host it happened at; empty if the message says it.
        advice: what to do next; empty if there is nothing to do.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, where: str = "", advice: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.where = where
        self.advice = advice

    def __str__(self) -> str:
        text = f"{self.where}: {self.message}" if self.where else self.message
        return f"{text}\n  {self.advice}" if self.advice else text


class ConfigError(QsnapError):
    """The VNE description is wrong. Raised before anything is started.

    Attributes:
        file: the description's name.
        line: the line of `key`, counted from 1; 0 where no line is to blame.
        key: the dotted key, such as `vm.web.memory`.
    """

    exit_code = 3

    def __init__(self, message: str, *, file: str, line: int, key: str, advice: str = "") -> None:
        where = f"{file}:{line}" if line else file
        super().__init__(f"{key}: {message}" if key else message, where=where, advice=advice)
        self.file = file
        self.line = line
        self.key = key


class StateError(QsnapError):
    """The VNE or the snapshot is not in a state that allows this: running, not running, no such name."""

    exit_code = 4


class NotUpError(StateError):
    """The VNE is not up on this host."""


class BusyError(StateError):
    """Another qsnap is at work on this VNE. Nothing was changed; try again when it has ended."""

    exit_code = 5


class InDoubtError(StateError):
    """An operation on several hosts has ended, and this one has not learned how. Its VMs run; nothing is lost."""

    exit_code = 15


class HostError(QsnapError):
    """This host lacks something: a privilege, a device, a program, space, huge pages."""

    exit_code = 6


class EngineRefusedError(QsnapError):
    """The engine asked for cannot capture this VM. Raised before the VM is paused."""

    exit_code = 7


class QemuError(QsnapError):
    """A QEMU process failed, ended, or answered with an error. Its reason is in the message."""

    exit_code = 8


class StreamError(QsnapError):
    """A migration stream is truncated, malformed or beyond its bounds.

    Attributes:
        stream_offset: bytes from the start of the stream to the record at fault.
    """

    exit_code = 9

    def __init__(self, message: str, *, stream_offset: int, where: str = "", advice: str = "") -> None:
        super().__init__(f"{message} (stream offset {stream_offset})", where=where, advice=advice)
        self.stream_offset = stream_offset


class IntegrityError(QsnapError):
    """A stored file is missing, altered or not what its manifest says. `file` names it."""

    exit_code = 10

    def __init__(self, message: str, *, file: str, advice: str = "") -> None:
        super().__init__(message, where=file, advice=advice)
        self.file = file


class AttachRefusedError(QsnapError):
    """A running VM has something that a snapshot could not bring back, so it is not attached. Nothing was changed."""

    exit_code = 11


class ProtocolError(QsnapError):
    """What came from another host cannot be true or meant at this point, or is not the protocol of this version."""

    exit_code = 12


class ConnectionLostError(QsnapError):
    """Another host cannot be reached, or the connection to it was lost."""

    exit_code = 13


class IdentityError(QsnapError):
    """An identity is damaged, expired, revoked, or not of the CA or the host that is expected."""

    exit_code = 14
