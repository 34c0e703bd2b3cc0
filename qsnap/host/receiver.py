"""The snapshot daemon: one process per VM that makes flat RAM files and a device stream of a migration stream.

It is a process of its own because it is CPU-bound, and synchronous because it does one thing. Its parent runs

    python -m qsnap.host.receiver --stream FD --status FD --directory DIR --backed pc.ram --ram-limit BYTES

and exchanges JSON lines over the status descriptor. From the receiver: `ready`, `tracking` (the first RAM record
has come, so the source's state is captured), `progress`, and at last `done` or `error`. With `--hold FD` it holds
QEMU when little is left to be sent (`qsnap.host.hold`), and says `settled` then, or `diverged`; a byte from the parent
has it let go. The parent sends nothing else.

With `--record-limit BYTES` the stream goes into one file as it is, and nothing is made of it. With `--stand-by` it is
read by the parent, and this process is there for the parent's death alone.

It ends with the stream, when the parent closes its end of the status descriptor, or at SIGTERM. It leaves the
files of a failed attempt behind: the parent removes the directory, or its heir does, which is started if it dies.
"""

from __future__ import annotations

import argparse
import errno
import fcntl
import json
import os
import select
import signal
import sys
import termios
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, NoReturn

import numpy as np

from qsnap.errors import HostError, StreamError
from qsnap.host.flatfile import FlatFile
from qsnap.host.hold import Hold
from qsnap.host.recording import check_ends, record
from qsnap.host.reserve import Reserve
from qsnap.host.streams import widen_pipe
from qsnap.rules.convergence import PATIENCE
from qsnap.wire import encode
from qsnap.wire.events import (
    Command,
    Configuration,
    DeviceBytes,
    EndOfStream,
    Event,
    PageRun,
    RamEnd,
    ZeroRun,
)
from qsnap.wire.records import CommandType, RAMBlock, RamSetup
from qsnap.wire.stream import StreamReader

_PROGRESS_S = 0.1
_DISCARD_BYTES = 1 << 20
_PATIENCE = "times the RAM that may be sent again before it is said to diverge"
_FIRST_BYTES = 16 << 10  #: read at a time until QEMU has saved its devices: nothing else is known so soon
_RESERVE_S = 2.0
_GIVE_WAY = "leave the processor to the VM for so long after `tracking`, and after the stream's end"
#: Device state of ordinary machines is below 1 MB; some display and assigned devices keep their memory in it.
_TAIL_LIMIT_BYTES = 1 << 30
RECORDED = "migration.stream"  #: the file of a stream kept as it came
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class ParentGoneError(Exception):
    """Nobody is left to report to."""


class Snapshot:
    """The files of one VM's snapshot while they come into being."""

    def __init__(self, directory: str, backed: Sequence[str], reserve: Reserve | None) -> None:
        self._directory = directory
        self._backed = backed
        self._reserve = reserve
        self._configuration = Configuration("", 0, b"")
        self._ram = RamSetup(0, 0, 0, ())
        self._kept_commands: list[Command] = []
        self._files: dict[str, FlatFile] = {}
        # Assembled only after the stream's end: until then the VM may be stopped and waiting for us to read.
        self._tail_fd = self._open_unlinked("tail")
        self.stream_bytes = 0

    def _open_unlinked(self, name: str) -> int:
        path = os.path.join(self._directory, f".{name}.part")
        fd = _create(path)
        os.unlink(path)
        return fd

    def apply(self, event: Event) -> None:
        """Take one event of the stream in."""
        match event:
            case PageRun():
                if self._reserve:
                    self._reserve.give_back(event.page_offsets.size * self._configuration.target_page_size)
                self._files[event.block.idstr].apply_pages(event)
            case ZeroRun():
                self._files[event.block.idstr].apply_zeros(event)
            case DeviceBytes():
                _append(self._tail_fd, event.data)
            case Configuration():
                self._configuration = event
            case RamSetup():
                self._create_files(event)
            case Command(CommandType.SWITCHOVER_START):
                self._kept_commands.append(event)
            case EndOfStream():
                self.stream_bytes = event.stream_bytes
            case Command() | RamEnd():
                pass

    def _create_files(self, ram: RamSetup) -> None:
        if not {block.idstr for block in ram.blocks} & set(self._backed):
            raise StreamError(f"the stream announces none of the RAMBlocks {self._backed}", stream_offset=0)
        self._ram = ram
        for block in ram.blocks:
            path = os.path.join(self._directory, file_name(block.idstr))
            self._files[block.idstr] = FlatFile(block, path, self._configuration.target_page_size)
            if block.idstr not in self._backed:
                os.unlink(path)

    def finish(self) -> dict[str, Any]:
        """Write the device stream; what the parent is told about the snapshot."""
        if self._reserve:
            self._reserve.close()
        blocks = [self._describe(flat) for flat in self._files.values() if flat.block.idstr in self._backed]
        path = os.path.join(self._directory, "device.stream")
        fd = _create(path)
        for piece in self._encode_head():
            _append(fd, memoryview(piece))
        self._copy_tail(fd)
        os.close(fd)
        return {
            "blocks": blocks,
            "ram_bytes": sum(block["used_length"] for block in blocks),
            "device_stream": path,
            "machine": self._configuration.machine,
            "stream_bytes": self.stream_bytes,
            "data_pages": sum(flat.data_pages for flat in self._files.values()),
            "zero_pages": sum(flat.zero_pages for flat in self._files.values()),
        }

    def _encode_head(self) -> Iterator[bytes]:
        yield self._configuration.raw
        yield encode.encode_ram_setup(self._ram)
        for command in self._kept_commands:
            yield encode.encode_command(command)
        yield encode.encode_ram_end(self._ram)
        for flat in self._files.values():
            if flat.block.idstr not in self._backed:
                yield from flat.encode_records()
        yield encode.encode_section_end(self._ram)

    def _copy_tail(self, fd: int) -> None:
        size, done = os.fstat(self._tail_fd).st_size, 0
        while done < size:
            done += os.sendfile(fd, self._tail_fd, done, size - done)

    def _describe(self, flat: FlatFile) -> dict[str, Any]:
        return {
            "idstr": flat.block.idstr,
            "used_length": flat.block.used_length,
            "file": flat.path,
            "pages": flat.data_pages,
            "zero_pages": flat.zero_pages,
        }


def file_name(idstr: str) -> str:
    """A RAMBlock's file name. Different names stay different, and none is hidden or leads elsewhere."""
    return "".join(_safe(character, first=not i) for i, character in enumerate(idstr)) + ".ram"


def _safe(character: str, *, first: bool) -> str:
    if character.isalnum() or character in "_-" or (character == "." and not first):
        return character
    return f"%{ord(character):02x}"


def _create(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)


def _append(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


class Status:
    """The conversation with the parent."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._received = b""
        self._progress_due = time.monotonic() + _PROGRESS_S  # `tracking` comes first

    def send(self, event: str, **fields: Any) -> None:
        """Tell the parent something."""
        line = json.dumps({"event": event, **fields}) + "\n"
        try:
            _append(self.fd, memoryview(line.encode()))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ParentGoneError from error

    def wait_gone(self) -> NoReturn:
        """Until nobody is left to report to."""
        select.select([self.fd], [], [])
        raise ParentGoneError

    def send_progress(self, stream_bytes: int) -> None:
        """Tell the parent how far the stream has come, but not too often."""
        now = time.monotonic()
        if now >= self._progress_due:
            self._progress_due = now + _PROGRESS_S
            self.send("progress", bytes=stream_bytes)


class Inlet:
    """The stream's descriptor, which is read for as long as there is a parent."""

    def __init__(self, fd: int, status: Status) -> None:
        self.fd = fd
        self.released = False  #: the parent has said the one thing that it has to say
        self._status_fd = status.fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLIN)
        self._poll.register(status.fd, select.POLLIN)

    def wait(self) -> None:
        """Until the stream has something; raises ParentGoneError when nobody is left to read it for."""
        while any(fd == self._status_fd for fd, _ in self._poll.poll()):
            self._listen()

    def wait_released(self, timeout_s: float) -> bool:
        """Leave the stream alone for so long, or until the parent has something to say; whether it has."""
        if not self.released and select.select([self._status_fd], [], [], timeout_s)[0]:
            self._listen()
        return self.released

    def count_queued(self) -> int:
        """Bytes of the stream that wait to be read."""
        return int.from_bytes(fcntl.ioctl(self.fd, termios.FIONREAD, bytes(4)), sys.byteorder)

    def _listen(self) -> None:
        if not os.read(self._status_fd, 1):
            raise ParentGoneError
        self.released = True


class Receiver:
    """Reads the stream, applies it to the snapshot, and answers both sides."""

    def __init__(
        self,
        inlet: Inlet,
        status: Status,
        snapshot: Snapshot,
        reader: StreamReader,
        give_way_s: tuple[float, float],
        hold: Hold | None,
    ) -> None:
        self._inlet = inlet
        self._status = status
        self._snapshot = snapshot
        self._reader = reader
        self._give_way_s = give_way_s  # at the first RAM record, at the end
        self._hold = hold
        self._received_bytes = 0
        self._tracking = False

    def run(self) -> None:
        """Until the stream's end."""
        event: Event | None = None
        while not isinstance(event, EndOfStream):
            event = self._reader.next_event()
            if self._hold and not self._hold.over:
                self._hold.follow(event, self._reader)
            if event is None:
                self._receive_more()
                continue
            if isinstance(event, PageRun | ZeroRun) and not self._tracking:
                self._tracking = True
                self._status.send("tracking")
                time.sleep(self._give_way_s[0])
            self._snapshot.apply(event)
        time.sleep(self._give_way_s[1])

    def _receive_more(self) -> None:
        self._inlet.wait()
        if self._inlet.released and self._hold and not self._hold.over:
            self._hold.end()
        try:
            room = self._reader.get_buffer()
            count = os.readv(self._inlet.fd, [room if self._tracking else room[:_FIRST_BYTES]])
        except ConnectionResetError:  # QEMU has closed its socket without looking for answers
            count = 0
        self._reader.buffer_updated(count)
        self._received_bytes += count
        self._status.send_progress(self._received_bytes)


def _parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="qsnap.host.receiver", description="Receive one VM's migration stream.")
    parser.add_argument("--stream", type=int, required=True, metavar="FD")
    parser.add_argument("--status", type=int, required=True, metavar="FD")
    parser.add_argument("--directory", required=True, help="an existing directory for the files")
    parser.add_argument("--backed", action="append", default=[], metavar="IDSTR", help="a RAMBlock for a file")
    parser.add_argument("--ram-limit", type=int, required=True, metavar="BYTES", help="of all RAMBlocks together")
    parser.add_argument("--tail-limit", type=int, default=_TAIL_LIMIT_BYTES, metavar="BYTES")
    parser.add_argument("--target-page-size", type=int, default=4096, metavar="BYTES")
    parser.add_argument("--hold", type=int, metavar="FD", help="QEMU's end of the stream: hold it when converged")
    parser.add_argument("--patience", type=float, default=PATIENCE, metavar="N", help=_PATIENCE)
    parser.add_argument("--give-way", type=float, nargs=2, default=(0.0, 0.0), metavar="S", help=_GIVE_WAY)
    parser.add_argument("--reserve", type=int, default=0, metavar="BYTES", help="take memory in advance, on tmpfs")
    parser.add_argument("--record-limit", type=int, metavar="BYTES", help="keep the stream as it is, up to this size")
    parser.add_argument("--stand-by", action="store_true", help="leave the stream to the parent while that lives")
    parser.add_argument("--keep-reading", action="store_true", help="read the stream to its end if the parent dies")
    parser.add_argument("--heir", type=json.loads, default=[], metavar="JSON", help="what to start if the parent dies")
    return parser.parse_args(arguments)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise InterruptedError(errno.EINTR, "terminated by a signal")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon; its exit code."""
    options = _parse_arguments(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, _terminate)
    for fd in (options.stream, options.status, *((options.hold,) if options.hold is not None else ())):
        os.set_inheritable(fd, False)  # an heir that held the stream open would let QEMU wait for ever
    status = Status(options.status)
    try:
        return _receive(options, status)
    except ParentGoneError:
        if options.heir:
            os.posix_spawn(options.heir[0], options.heir, os.environ, setsid=True)
        if options.keep_reading:
            _read_to_end(options.stream)
        return HostError.exit_code


def _read_to_end(stream_fd: int) -> None:
    """Before QEMU 8.1 a background snapshot that breaks off leaves the guest's memory locked for ever."""
    while os.read(stream_fd, _DISCARD_BYTES):
        pass


def _receive(options: argparse.Namespace, status: Status) -> int:
    try:
        widen_pipe(options.stream)
        if options.stand_by:
            status.wait_gone()
        inlet = Inlet(options.stream, status)
        if options.record_limit is None:
            _keep_newest(options, inlet, status)
        else:
            _keep_all(options, inlet, status)
    except StreamError as error:
        text = " ".join(filter(None, [error.message, error.advice]))
        status.send("error", kind="stream", message=text, stream_offset=error.stream_offset)
        return StreamError.exit_code
    except HostError as error:
        status.send("error", kind="limit", message=error.message, advice=error.advice)
        return HostError.exit_code
    except OSError as error:
        kind = "space" if error.errno in _NO_SPACE else "os"
        status.send("error", kind=kind, message=str(error))
        return HostError.exit_code
    except MemoryError:
        status.send("error", kind="os", message="the receiver got no memory", advice="Free some of the host's memory.")
        return HostError.exit_code
    return 0


def _keep_newest(options: argparse.Namespace, inlet: Inlet, status: Status) -> None:
    """The newest copy of each page, in flat files, and a device stream."""
    limits = {"ram_limit_bytes": options.ram_limit, "tail_limit_bytes": options.tail_limit}
    reader = StreamReader(**limits, target_page_size=options.target_page_size)
    reserve = Reserve(options.directory, options.reserve, _RESERVE_S) if options.reserve else None
    snapshot = Snapshot(options.directory, options.backed, reserve)
    _warm_up()
    status.send("ready")
    hold = None
    if options.hold is not None:
        hold = Hold(options.hold, inlet.wait_released, inlet.count_queued, status.send, options.patience)
    Receiver(inlet, status, snapshot, reader, options.give_way, hold).run()
    status.send("done", **snapshot.finish())


def _warm_up() -> None:
    """Read a stream of a few pages: the parser's first run is its slowest, and would fall into the pause."""
    block = RAMBlock("warm", 64 << 12)
    ram = RamSetup(0, 0, 4, (block,))
    offsets = np.arange(64, dtype=np.uint64) << np.uint64(12)
    pieces = (
        encode.encode_configuration("none"),
        encode.encode_ram_setup(ram),
        encode.encode_ram_end(ram),
        encode.encode_pages(block, offsets, np.ones((64, 1 << 12), np.uint8)),
        encode.encode_zero_pages(block, offsets),
    )
    reader = StreamReader(ram_limit_bytes=block.used_length, tail_limit_bytes=0)
    data = b"".join(pieces)
    reader.get_buffer()[: len(data)] = data
    reader.buffer_updated(len(data))
    while reader.next_event() is not None:
        pass


def _keep_all(options: argparse.Namespace, inlet: Inlet, status: Status) -> None:
    """The stream as it comes, in one file."""
    path = os.path.join(options.directory, RECORDED)
    fd = _create(path)
    status.send("ready")
    size = record(inlet.fd, fd, options.record_limit, inlet.wait, status.send_progress)
    configuration, ram = check_ends(fd, size, options.ram_limit, options.target_page_size)
    ram_bytes = sum(block.used_length for block in ram.blocks if block.idstr in options.backed)
    sizes = {"ram_bytes": ram_bytes, "stream_bytes": size}
    status.send("done", blocks=[], device_stream=path, machine=configuration.machine, **sizes)


if __name__ == "__main__":
    sys.exit(main())
