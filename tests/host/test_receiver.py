"""The snapshot daemon as a real process, over real pipes and sockets."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qsnap.host.hold import BEGIN_S
from qsnap.host.receiver import file_name
from qsnap.host.streams import open_stream
from tests.wire import building as b
from tests.wire.folding import RECORDED, fold, read_recorded

DEADLINE_S = 30
BLOCKS = {"pc.ram": 64 * b.PAGE, "vga.vram": 4 * b.PAGE}
A, B = b"a" * b.PAGE, b"b" * b.PAGE


class Daemon:
    """A receiver, the write end of its stream, and the parent's end of its status socket."""

    def __init__(
        self,
        directory: Path,
        *options: str,
        stream: socket.socket | None = None,
        backed: str = "pc.ram",
        held: bool = False,
    ) -> None:
        read_fd, write_fd = (stream.detach(), -1) if stream else open_stream(held=held)
        self.stream = os.fdopen(write_fd, "wb", buffering=0) if write_fd >= 0 else None
        self.status, theirs = socket.socketpair()
        self.status.settimeout(DEADLINE_S)
        command = [sys.executable, "-m", "qsnap.host.receiver", "--stream", str(read_fd), "--directory", str(directory)]
        command += ["--status", str(theirs.fileno()), "--backed", backed, "--ram-limit", str(1 << 26), *options]
        fds = [read_fd, theirs.fileno()]
        if held:
            assert os.read(write_fd, 64) == b"\0\1\0\4\0\0\0\0"  # QEMU is told that there will be no answers
            fds.append(write_fd)
            command += ["--hold", str(write_fd)]
        self.process = subprocess.Popen(command, pass_fds=fds)
        os.close(read_fd)
        theirs.close()
        self.lines = self.status.makefile("r")

    def message(self) -> dict[str, Any]:
        """The next message other than progress; empty if the receiver has closed its end."""
        while (message := json.loads(self.lines.readline() or "{}")).get("event") == "progress":
            assert message["bytes"] >= 0
        assert isinstance(message, dict)
        return message

    def send(self, data: bytes) -> None:
        assert self.stream is not None
        rest = memoryview(data)
        while rest:
            rest = rest[self.stream.write(rest) :]

    def finish(self, data: bytes = b"") -> dict[str, Any]:
        """Send the rest of the stream; the last message."""
        assert self.stream is not None
        sender = threading.Thread(target=self._send_and_close, args=(data,))
        sender.start()
        message = self.message()
        if message["event"] == "tracking":
            message = self.message()
        sender.join(DEADLINE_S)
        return message

    def _send_and_close(self, data: bytes) -> None:
        assert self.stream is not None
        with self.stream, contextlib.suppress(BrokenPipeError):
            self.send(data)

    def exit_code(self) -> int:
        return self.process.wait(DEADLINE_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.lines.close()
        self.status.close()
        if self.stream is not None:
            self.stream.close()


@pytest.fixture
def daemons(tmp_path: Path) -> Iterator[Any]:
    """Starts receivers that write below tmp_path, and ends them."""
    started: list[Daemon] = []

    def start(*options: str, **arguments: Any) -> Daemon:
        daemon = Daemon(tmp_path, *options, **arguments)
        started.append(daemon)
        assert daemon.message() == {"event": "ready"}
        return daemon

    yield start
    for daemon in started:
        daemon.close()


@pytest.mark.parametrize("name", RECORDED)
def test_recorded_stream(name: str, daemons: Any, tmp_path: Path) -> None:
    data = read_recorded(name)
    daemon = daemons()
    done = daemon.finish(data)
    assert done["event"] == "done"
    assert daemon.exit_code() == 0
    original = fold([data])
    again = fold([Path(done["device_stream"]).read_bytes()])
    assert original.configuration is not None
    assert original.end is not None
    (block,) = done["blocks"]
    zero = sum(idstr == "pc.ram" for idstr, _ in original.zero)
    assert block == {
        "idstr": "pc.ram",
        "used_length": 4 << 20,
        "file": str(tmp_path / "pc.ram.ram"),
        "pages": 1024 - zero,
        "zero_pages": zero,
    }
    assert (done["machine"], done["stream_bytes"]) == (original.configuration.machine, original.end.stream_bytes)
    assert done["data_pages"] + done["zero_pages"] == len(original.sent)
    assert Path(block["file"]).read_bytes() == original.images["pc.ram"]
    assert again.sent == {key for key in original.sent if key[0] != "pc.ram"}
    assert again.devices == original.devices
    assert all(again.images[idstr] == image for idstr, image in original.images.items() if idstr != "pc.ram")


def test_files_are_private_sparse_and_few(daemons: Any, tmp_path: Path) -> None:
    daemon = daemons()
    daemon.finish(b.stream(b.part(b.data_page(8 * b.PAGE, A, "pc.ram")), b.end(), blocks=BLOCKS))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device.stream", "pc.ram.ram"]
    status = (tmp_path / "pc.ram.ram").stat()
    assert (status.st_mode & 0o777, status.st_size) == (0o600, BLOCKS["pc.ram"])
    assert status.st_blocks * 512 < 4 * b.PAGE
    assert (tmp_path / "device.stream").stat().st_mode & 0o777 == 0o600


def test_a_page_that_becomes_zero_reads_as_zero(daemons: Any, tmp_path: Path) -> None:
    first = b.part(b.data_page(0, A, "pc.ram") + b.data_page(b.PAGE, A) + b.data_page(0, A, "vga.vram"))
    second = b.part(b.zero_page(0, "pc.ram") + b.data_page(b.PAGE, B) + b.zero_page(0, "vga.vram"))
    done = daemons().finish(b.stream(first, second, b.end(), blocks=BLOCKS))
    assert (tmp_path / "pc.ram.ram").read_bytes()[: 2 * b.PAGE] == bytes(b.PAGE) + B
    assert (done["blocks"][0]["pages"], done["blocks"][0]["zero_pages"]) == (1, 1)
    again = fold([(tmp_path / "device.stream").read_bytes()])
    assert again.zero == again.sent == {("vga.vram", 0)}


def test_a_page_that_is_no_longer_zero_is_sent_as_it_is(daemons: Any, tmp_path: Path) -> None:
    both = b.zero_page(0, "vga.vram") + b.zero_page(b.PAGE) + b.data_page(0, A)
    done = daemons().finish(b.stream(b.part(both), b.end(), blocks=BLOCKS))
    again = fold([(tmp_path / "device.stream").read_bytes()])
    assert again.images["vga.vram"][: 2 * b.PAGE] == A + bytes(b.PAGE)
    assert (done["data_pages"], done["zero_pages"]) == (1, 1)


def test_tracking_is_told_before_the_stream_goes_on(daemons: Any) -> None:
    daemon = daemons()
    stream = b.stream(b.part(b.zero_page(0, "pc.ram")), b.end(), blocks=BLOCKS)
    head = stream.index(b.part(b.zero_page(0, "pc.ram")))
    first = head + 5 + len(b.zero_page(0, "pc.ram"))
    daemon.send(stream[:first])
    assert daemon.message() == {"event": "tracking"}
    assert daemon.finish(stream[first:])["event"] == "done"


def test_no_tracking_without_a_ram_record(daemons: Any) -> None:
    daemon = daemons()
    daemon.send(b.header() + b.setup(BLOCKS) + b.part(b""))
    daemon.stream.close()
    assert daemon.message()["event"] == "error"


def test_a_page_that_becomes_zero_becomes_a_hole(daemons: Any) -> None:
    full = b.part(b"".join(b.data_page(index * b.PAGE, bytes([7]) * b.PAGE, "pc.ram") for index in range(64)))
    empty = b.part(b"".join(b.zero_page(index * b.PAGE, "pc.ram") for index in range(64)))
    daemon = daemons()
    done = daemon.finish(b.header() + b.setup({"pc.ram": 64 * b.PAGE}) + full + empty + b.end() + b.devices())
    file = os.stat(done["blocks"][0]["file"])
    assert (file.st_size, file.st_blocks) == (64 * b.PAGE, 0)


def test_a_stream_that_must_not_break_is_read_to_its_end(daemons: Any) -> None:
    """The parent goes away in the middle; the source can still write as much as it likes."""
    daemon = daemons("--keep-reading")
    daemon.send(b.header() + b.setup(BLOCKS) + b.part(b.zero_page(0, "pc.ram")))
    assert daemon.message() == {"event": "tracking"}
    daemon.status.close()
    for _ in range(64):
        daemon.send(bytes(1 << 20))  # far more than a pipe holds
    assert daemon.process.poll() is None
    daemon.stream.close()
    assert daemon.exit_code() != 0


def test_without_return_path_a_ping_is_not_answered(daemons: Any) -> None:
    stream = b.header() + b.command(1) + b.command(2, b"ping") + b.setup(BLOCKS) + b.end() + b.devices()
    daemon = daemons()
    assert daemon.finish(stream)["event"] == "done"
    again = fold([(daemon_directory(daemon) / "device.stream").read_bytes()])
    assert again.commands == []


FIRST_PASS = b.part(
    b.data_page(0, A, "pc.ram")
    + b"".join(b.zero_page(index * b.PAGE) for index in range(1, 64))
    + b"".join(b.zero_page(index * b.PAGE, "vga.vram") for index in range(4))
)


def write_while_it_goes(daemon: Daemon, data: bytes, timeout_s: float) -> int:
    """How much of it can be written without waiting longer than that for room."""
    assert daemon.stream is not None
    os.set_blocking(daemon.stream.fileno(), False)
    done = 0
    while done < len(data) and select.select([], [daemon.stream], [], timeout_s)[1]:
        done += daemon.stream.write(data[done:]) or 0
    os.set_blocking(daemon.stream.fileno(), True)
    return done


def test_who_is_held_waits_when_little_is_left(daemons: Any, tmp_path: Path) -> None:
    daemon = daemons(held=True)
    again = b.part(b.data_page(0, B, "pc.ram"))
    daemon.send(b.header() + b.setup(BLOCKS) + FIRST_PASS)
    assert daemon.message() == {"event": "tracking"}
    time.sleep(2 * BEGIN_S)
    daemon.send(again * 20)
    assert daemon.message() == {"event": "settled"}
    sections = again * 1000
    done = write_while_it_goes(daemon, sections, 0.02)
    assert done < len(sections) / 10
    rest = sections[done:]
    caught_up = write_while_it_goes(daemon, rest, 3.0)  # now and then it may go on
    assert caught_up > 0
    daemon.status.send(b".")
    daemon.send(rest[caught_up:])
    assert daemon.finish(b.end() + b.devices())["event"] == "done"
    assert (tmp_path / "pc.ram.ram").read_bytes() == B + bytes(63 * b.PAGE)
    assert daemon.exit_code() == 0


def test_who_makes_many_short_passes_at_once_is_held_all_the_same(daemons: Any) -> None:
    """They come before they are believed, and all in one piece."""
    daemon = daemons(held=True)
    daemon.send(b.header() + b.setup(BLOCKS) + FIRST_PASS + b.part(b"") * 2000)
    assert daemon.message() == {"event": "tracking"}
    time.sleep(2 * BEGIN_S)
    for _ in range(3):
        daemon.send(b.part(b""))
        time.sleep(0.01)
    assert daemon.message() == {"event": "settled"}
    daemon.status.send(b".")
    assert daemon.finish(b.end() + b.devices())["event"] == "done"


def test_who_is_held_catches_up_with_all_that_it_had_sent(daemons: Any) -> None:
    """Whatever number of passes that is: otherwise what is behind them would fall into the pause."""
    daemon = daemons(held=True)
    daemon.send(b.header() + b.setup(BLOCKS) + FIRST_PASS)
    assert daemon.message() == {"event": "tracking"}
    time.sleep(2 * BEGIN_S)
    again = b.part(b.data_page(0, B, "pc.ram"))
    daemon.send(again * 3)
    assert daemon.message() == {"event": "settled"}
    sections = again * 2000
    assert write_while_it_goes(daemon, sections, 3.0) == len(sections)
    daemon.status.send(b".")
    assert daemon.finish(b.end() + b.devices())["event"] == "done"


def test_who_is_let_go_at_once_is_never_held(daemons: Any) -> None:
    daemon = daemons(held=True)
    daemon.status.send(b".")
    daemon.send(b.header() + b.setup(BLOCKS) + FIRST_PASS + b.part(b"") * 1000)
    assert daemon.finish(b.end() + b.devices())["event"] == "done"


def test_who_sends_too_much_again_is_said_to_diverge(daemons: Any) -> None:
    daemon = daemons("--patience", "1.5", held=True)
    daemon.send(b.header() + b.setup({"pc.ram": 4096 * b.PAGE}))
    whole = b.part(b.zero_page(0, "pc.ram") + b"".join(b.zero_page(index * b.PAGE) for index in range(1, 4096)))
    daemon.send(whole * 2)
    assert daemon.message() == {"event": "tracking"}
    daemon.send(whole)
    assert daemon.message() == {"event": "diverged"}
    daemon.status.send(b".")
    assert daemon.finish(b.end() + b.devices())["event"] == "done"


def test_who_is_held_when_the_parent_is_gone_can_go_on(daemons: Any) -> None:
    daemon = daemons(held=True)
    daemon.send(b.header() + b.setup(BLOCKS) + FIRST_PASS + b.part(b"") * 2)
    assert daemon.message() == {"event": "tracking"}
    time.sleep(2 * BEGIN_S)  # it is not believed at once
    daemon.send(b.part(b"") * 3)
    assert daemon.message() == {"event": "settled"}
    daemon.lines.close()
    daemon.status.close()
    assert daemon.exit_code() == 6
    with pytest.raises(BrokenPipeError):
        daemon.send(bytes(1 << 20))


def daemon_directory(daemon: Daemon) -> Path:
    arguments = daemon.process.args
    assert isinstance(arguments, list)
    return Path(str(arguments[arguments.index("--directory") + 1]))


REFUSED = {
    "truncated": read_recorded(RECORDED[0])[:-1],
    "killed in RAM": read_recorded(RECORDED[0])[:300_000],
    "no stream": b"GET / HTTP/1.1\r\n\r\n",
    "nothing": b"",
    "too large": b.header() + b.setup({"pc.ram": 1 << 40}),
    "outside": b.header() + b.setup(BLOCKS) + b"\2" + b.part(b.zero_page(1 << 40, "pc.ram"))[1:],
    "block missing": b.header() + b.setup({"mem0": b.PAGE}),
}


@pytest.mark.parametrize("name", RECORDED)
def test_a_stream_is_kept_as_it_comes(name: str, daemons: Any, tmp_path: Path) -> None:
    data = read_recorded(name)
    daemon = daemons("--record-limit", str(len(data)))
    done = daemon.finish(data)
    path = tmp_path / "migration.stream"
    assert done.pop("machine").startswith("pc-")
    assert done.pop("ram_bytes") == 4 << 20
    assert done == {"event": "done", "blocks": [], "device_stream": str(path), "stream_bytes": len(data)}
    assert daemon.exit_code() == 0
    assert [(file, file.read_bytes()) for file in tmp_path.iterdir()] == [(path, data)]
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_stream_beyond_its_limit(daemons: Any, tmp_path: Path) -> None:
    data = read_recorded(RECORDED[0])
    limit = len(data) - 1
    daemon = daemons("--record-limit", str(limit))
    error = daemon.finish(data)
    assert (error["event"], error["kind"]) == ("error", "limit")
    assert f"limit of {limit} bytes" in error["message"]
    assert "precopy" in error["advice"]
    assert daemon.exit_code() == 6
    assert (tmp_path / "migration.stream").stat().st_size <= limit + 1


@pytest.mark.parametrize("options", [(), ("--record-limit", "1000000000")], ids=["newest", "record"])
@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED.keys())
def test_refused_streams(data: bytes, options: tuple[str, ...], daemons: Any) -> None:
    daemon = daemons(*options)
    error = daemon.finish(data)
    assert (error["event"], error["kind"]) == ("error", "stream")
    assert 0 <= error["stream_offset"] <= len(data)
    assert error["message"]
    assert daemon.exit_code() == 9


def test_device_state_beyond_its_limit(daemons: Any) -> None:
    error = daemons("--tail-limit", "1000").finish(
        b.stream(b.end(), blocks=BLOCKS, tail=b.devices(content=bytes(2000)))
    )
    assert "device state" in error["message"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts a small tmpfs")
def test_a_full_file_system(daemons: Any, tmp_path: Path) -> None:
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], check=True)
    try:
        daemon = daemons()
        error = daemon.finish(read_recorded(RECORDED[0]))
        assert (error["event"], error["kind"]) == ("error", "space")
        assert daemon.exit_code() == 6
        daemon.close()
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_no_directory(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path / "missing")
    try:
        assert daemon.message()["kind"] == "os"
        assert daemon.exit_code() == 6
    finally:
        daemon.close()


def test_sigterm(daemons: Any) -> None:
    daemon = daemons()
    daemon.send(b.header())
    daemon.process.send_signal(signal.SIGTERM)
    error = daemon.message()
    assert (error["event"], error["kind"]) == ("error", "os")
    assert daemon.exit_code() == 6


@pytest.mark.parametrize("sent", [b"", b.header() + b.setup(BLOCKS) + b.part(b.zero_page(0, "pc.ram"))])
def test_the_parent_is_gone(sent: bytes, daemons: Any) -> None:
    daemon = daemons()
    daemon.send(sent)
    if sent:
        assert daemon.message() == {"event": "tracking"}
    daemon.lines.close()
    daemon.status.close()
    assert daemon.exit_code() == 6  # although the stream is open and nothing comes


def test_status_may_be_a_pipe_whose_reader_goes_away(tmp_path: Path) -> None:
    stream, stream_end = os.pipe()
    status_end, status = os.pipe()
    command = [sys.executable, "-m", "qsnap.host.receiver", "--stream", str(stream), "--directory", str(tmp_path)]
    command += ["--status", str(status), "--ram-limit", "1"]
    with subprocess.Popen(command, pass_fds=(stream, status)) as process:
        os.close(status)
        with os.fdopen(status_end, "rb") as lines:
            assert json.loads(lines.readline()) == {"event": "ready"}
        assert process.wait(DEADLINE_S) == 6
    os.close(stream)
    os.close(stream_end)


@pytest.mark.parametrize(
    ("idstr", "name"),
    [
        ("pc.ram", "pc.ram.ram"),
        ("/rom@etc/acpi/rsdp", "%2from%40etc%2facpi%2frsdp.ram"),
        ("..", "%2e..ram"),
        (".x", "%2ex.ram"),
        ("a%2f", "a%252f.ram"),
    ],
)
def test_file_names(idstr: str, name: str) -> None:
    assert file_name(idstr) == name
