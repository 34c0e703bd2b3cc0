"""The snapshot daemon: one process per VM that turns a migration stream into flat RAM files and a device stream.

It is a process of its own because it is CPU-bound, and synchronous because it does one thing. Its parent starts

    python -m qsnap.host.receiver --stream FD --status FD --directory DIR --backed pc.ram --ram-limit BYTES

and exchanges JSON lines over the status descriptor. From the receiver: `ready`, `tracking` (the first RAM record is
here, so the source's state is captured), `progress`, and at last `done` or `error`. To the receiver, with
`--return-path`: {"command": "ack"}, which lets a source with capability switchover-ack stop the VM.

It ends when the stream ends, when the parent closes its end of the status descriptor, or at SIGTERM. It leaves the
files of a failed attempt behind: the parent removes the directory.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import fcntl
import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsnap.errors import HostError, StreamError
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
from qsnap.wire.records import CommandType, RAMBlock, RamSetup, ReturnPathMessage
from qsnap.wire.stream import StreamReader

_IOV_MAX = 1024
_PIPE_BYTES = (4 << 20, 1 << 20)  #: sizes to ask for; the second is what an ordinary user may have
_PROGRESS_S = 0.1
_COPY_BYTES = 1 << 20
_STATUS_LINE_LIMIT = 4096
#: Device state of ordinary machines is below 1 MB; some display and assigned devices keep their memory in it.
_TAIL_LIMIT_BYTES = 1 << 30
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


class ParentGoneError(Exception):
    """Nobody is left to report to."""


class FlatFile:
    """A RAMBlock as a sparse file: the page at offset X is at file offset X, pages never written are holes."""

    def __init__(self, block: RAMBlock, path: str, target_page_size: int) -> None:
        self.block = block
        self.path = path
        self._target_page_size = target_page_size
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, block.used_length)
        pages = block.used_length // target_page_size
        self._has_data = np.zeros(pages, np.bool_)
        self._is_zero = np.zeros(pages, np.bool_)

    @property
    def data_pages(self) -> int:
        """Pages whose newest content is not zero."""
        return int(np.count_nonzero(self._has_data))

    @property
    def zero_pages(self) -> int:
        """Pages that were sent, and are zero."""
        return int(np.count_nonzero(self._is_zero))

    def apply_pages(self, run: PageRun) -> None:
        """Write pages, those that are neighbours in the file with one call."""
        size = self._target_page_size
        indices = run.page_offsets // np.uint64(size)
        self._has_data[indices] = True
        self._is_zero[indices] = False
        for begin, end in _neighbours(indices):
            pages = [run.buffer[position : position + size] for position in run.positions[begin:end].tolist()]
            _write_all(self._fd, pages, int(run.page_offsets[begin]))

    def apply_zeros(self, run: ZeroRun) -> None:
        """Note zero pages. What was never written reads as zero already."""
        size = self._target_page_size
        indices = run.page_offsets // np.uint64(size)
        self._is_zero[indices] = True
        stale = indices[self._has_data[indices]]
        self._has_data[stale] = False
        zero_page = memoryview(bytes(size))
        for index in stale.tolist():
            _write_all(self._fd, [zero_page], index * size)

    def encode_records(self) -> Iterator[bytes]:
        """All pages that were sent, as records of a stream."""
        size = self._target_page_size
        per_chunk = _COPY_BYTES // size
        data = np.flatnonzero(self._has_data)
        for chunk in np.split(data, range(per_chunk, data.size, per_chunk)):
            content = b"".join(os.pread(self._fd, size, index * size) for index in chunk.tolist())
            pages = np.frombuffer(content, np.uint8).reshape(-1, size)
            yield encode.encode_pages(self.block, chunk.astype(np.uint64) * np.uint64(size), pages)
        zeros = np.flatnonzero(self._is_zero).astype(np.uint64) * np.uint64(size)
        yield encode.encode_zero_pages(self.block, zeros)

    def close(self) -> None:
        """Give the descriptor back."""
        os.close(self._fd)


def _neighbours(indices: NDArray[np.uint64]) -> Iterator[tuple[int, int]]:
    """Slices of `indices` in which each is its predecessor plus one."""
    edges = np.flatnonzero(np.diff(indices) != 1) + 1
    bounds = [0, *edges.tolist(), indices.size]
    return zip(bounds, bounds[1:], strict=False)


def _write_all(fd: int, pieces: list[memoryview], offset: int) -> None:
    """Write `pieces` one behind the other at `offset`. A full file system writes short first and then fails."""
    while pieces:
        batch = pieces[:_IOV_MAX]
        written = os.pwritev(fd, batch, offset)
        offset += written
        done = 0
        while done < len(batch) and written >= len(batch[done]):
            written -= len(batch[done])
            done += 1
        pieces = pieces[done:]
        if written:
            pieces[0] = pieces[0][written:]


class Snapshot:
    """The files of one VM's snapshot while they come into being."""

    def __init__(self, directory: str, backed: Sequence[str]) -> None:
        self._directory = directory
        self._backed = backed
        self._configuration = Configuration("", 0, b"")
        self._ram = RamSetup(0, 0, 0, ())
        self._kept_commands: list[Command] = []
        self._files: dict[str, FlatFile] = {}
        # Assembled only after the stream's end: until then the VM may be stopped and waiting for us to read.
        self._tail_fd = self._open_unlinked("tail")
        self.stream_bytes = 0

    def _open_unlinked(self, name: str) -> int:
        path = os.path.join(self._directory, f".{name}.part")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.unlink(path)
        return fd

    def apply(self, event: Event) -> None:
        """Take one event of the stream in."""
        match event:
            case PageRun():
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
        missing = set(self._backed) - {block.idstr for block in ram.blocks}
        if missing:
            raise StreamError(f"the stream announces no RAMBlock {missing.pop()!r}", stream_offset=0)
        self._ram = ram
        for block in ram.blocks:
            path = os.path.join(self._directory, file_name(block.idstr))
            self._files[block.idstr] = FlatFile(block, path, self._configuration.target_page_size)
            if block.idstr not in self._backed:
                os.unlink(path)

    def finish(self) -> dict[str, Any]:
        """Write the device stream; what the parent is told about the snapshot."""
        path = os.path.join(self._directory, "device.stream")
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        for piece in self._encode_head():
            _append(fd, memoryview(piece))
        self._copy_tail(fd)
        os.close(fd)
        return {
            "blocks": [
                self._describe(flat) for flat in self._files.values() if flat.block.idstr in self._backed
            ],
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
    safe = (
        c if c.isalnum() or c in "_-" or (c == "." and i) else f"%{ord(c):02x}" for i, c in enumerate(idstr)
    )
    return "".join(safe) + ".ram"


def _append(fd: int, data: memoryview) -> None:
    while data:
        data = data[os.write(fd, data) :]


class Status:
    """The conversation with the parent."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._received = b""
        self._progress_due = 0.0

    def send(self, event: str, **fields: Any) -> None:
        """Tell the parent something."""
        line = json.dumps({"event": event, **fields}) + "\n"
        try:
            _append(self.fd, memoryview(line.encode()))
        except (BrokenPipeError, ConnectionResetError) as error:
            raise ParentGoneError from error

    def send_progress(self, stream_bytes: int) -> None:
        """Tell the parent how far the stream has come, but not too often."""
        now = time.monotonic()
        if now >= self._progress_due:
            self._progress_due = now + _PROGRESS_S
            self.send("progress", bytes=stream_bytes)

    def read_commands(self) -> list[str]:
        """What the parent asks for. A line that is no command is the parent's fault and ends this process."""
        data = os.read(self.fd, _STATUS_LINE_LIMIT)
        if not data:
            raise ParentGoneError
        *lines, self._received = (self._received + data).split(b"\n")
        return [json.loads(line)["command"] for line in lines]


class Receiver:
    """Reads the stream, applies it to the snapshot, and answers both sides."""

    def __init__(
        self, stream_fd: int, status: Status, snapshot: Snapshot, reader: StreamReader, answer: bool
    ) -> None:
        self._stream_fd = stream_fd
        self._status = status
        self._snapshot = snapshot
        self._reader = reader
        self._answer = answer
        self._tracking = False
        self._shut = not answer
        self._poll = select.poll()
        self._poll.register(stream_fd, select.POLLIN)
        self._poll.register(status.fd, select.POLLIN)

    def run(self) -> None:
        """Until the stream's end."""
        while not isinstance(event := self._next_event(), EndOfStream):
            if not self._tracking and isinstance(event, PageRun | ZeroRun):
                self._tracking = True
                self._status.send("tracking")
            if isinstance(event, Command) and event.command is CommandType.PING:
                self._send_return_path(ReturnPathMessage.PONG, event.data)
            self._snapshot.apply(event)
        self._snapshot.apply(event)

    def _next_event(self) -> Event:
        while (event := self._reader.next_event()) is None:
            if not self._shut and self._reader.is_complete():
                self._shut = True
                self._send_return_path(ReturnPathMessage.SHUT, bytes(4))
            self._wait()
            self._reader.buffer_updated(os.readv(self._stream_fd, [self._reader.get_buffer()]))
            self._status.send_progress(self._reader.stream_offset)
        return event

    def _wait(self) -> None:
        """Until the stream has something; meanwhile do as the parent says, and notice when it is gone."""
        readable = False
        while not readable:
            for fd, events in self._poll.poll():
                if fd == self._stream_fd:
                    readable = True
                elif events & select.POLLIN:
                    self._obey()
                else:
                    raise ParentGoneError

    def _obey(self) -> None:
        for command in self._status.read_commands():
            if command == "ack":
                self._send_return_path(ReturnPathMessage.SWITCHOVER_ACK)

    def _send_return_path(self, message: ReturnPathMessage, data: bytes = b"") -> None:
        if self._answer:
            _append(self._stream_fd, memoryview(encode.encode_return_path(message, data)))


def _parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="qsnap.host.receiver", description="Receive one VM's migration stream."
    )
    parser.add_argument("--stream", type=int, required=True, metavar="FD")
    parser.add_argument("--status", type=int, required=True, metavar="FD")
    parser.add_argument("--directory", required=True, help="an existing directory for the files")
    parser.add_argument(
        "--backed", action="append", default=[], metavar="IDSTR", help="a RAMBlock that gets a file"
    )
    parser.add_argument(
        "--ram-limit", type=int, required=True, metavar="BYTES", help="of all RAMBlocks together"
    )
    parser.add_argument("--tail-limit", type=int, default=_TAIL_LIMIT_BYTES, metavar="BYTES")
    parser.add_argument("--target-page-size", type=int, default=4096, metavar="BYTES")
    parser.add_argument(
        "--return-path", action="store_true", help="the stream is a socket whose source wants answers"
    )
    return parser.parse_args(arguments)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise InterruptedError(errno.EINTR, "terminated by a signal")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the daemon; its exit code."""
    options = _parse_arguments(sys.argv[1:] if arguments is None else arguments)
    signal.signal(signal.SIGTERM, _terminate)
    status = Status(options.status)
    try:
        return _receive(options, status)
    except ParentGoneError:
        return HostError.exit_code


def _receive(options: argparse.Namespace, status: Status) -> int:
    reader_limits = {"ram_limit_bytes": options.ram_limit, "tail_limit_bytes": options.tail_limit}
    reader = StreamReader(**reader_limits, target_page_size=options.target_page_size)
    try:
        snapshot = Snapshot(options.directory, options.backed)
        _widen(options.stream)
        status.send("ready")
        Receiver(options.stream, status, snapshot, reader, options.return_path).run()
        status.send("done", **snapshot.finish())
    except StreamError as error:
        text = " ".join(filter(None, [error.message, error.advice]))
        status.send("error", kind="stream", message=text, stream_offset=error.stream_offset)
        return StreamError.exit_code
    except OSError as error:
        kind = "space" if error.errno in _NO_SPACE else "os"
        status.send("error", kind=kind, message=str(error), stream_offset=reader.stream_offset)
        return HostError.exit_code
    return 0


def _widen(stream_fd: int) -> None:
    """Let the kernel hold more of a pipe: the VM's last pages are then out of QEMU while we still write others."""
    for size in _PIPE_BYTES:
        with contextlib.suppress(OSError):
            fcntl.fcntl(stream_fd, fcntl.F_SETPIPE_SZ, size)
            return


if __name__ == "__main__":
    sys.exit(main())
