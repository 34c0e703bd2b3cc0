"""An ordinary user for the live tests: a number without an account, with a home, and a shell to run qsnap in.

Root gives the user's processes a mount namespace of their own, so that they may enter the checkout and its Python where
these lie in a directory of root's, and so that device nodes can have any mode without the machine's being touched.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import field, frozen

import qsnap
from tests.live.lab import ROOT

DEVICES = {"/dev/net/tun": 0o666, "/dev/userfaultfd": 0o600}  #: as Debian has them
TIMEOUT_S = 180


@frozen
class OrdinaryUser:
    """A user and their directories, all of which are in `home`."""

    uid: int
    home: Path
    devices: Mapping[str, int] = field(factory=DEVICES.copy)  #: their modes, as the user sees them

    @property
    def place(self) -> qsnap.Place:
        """Where qsnap keeps things when nobody tells it where."""
        return qsnap.Place(self.home / "run/qsnap", self.home / ".local/share/qsnap")

    def start(self, *command: str, **options: Any) -> subprocess.Popen[str]:
        """A process of the user's."""
        identity = ["setpriv", f"--reuid={self.uid}", f"--regid={self.uid}", "--clear-groups", "--bounding-set=-all"]
        script = "\n".join(["set -e", *self._view(), f"exec {shlex.join([*identity, *command])}"])
        environment = {
            "HOME": str(self.home),
            "XDG_RUNTIME_DIR": str(self.home / "run"),
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(ROOT),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        return subprocess.Popen(
            ["unshare", "--mount", "bash", "-c", script], env=environment, cwd=self.home, text=True, **options
        )

    def _view(self) -> Iterator[str]:
        """Shell commands that lay out what the user may see."""
        yield f"mount -t tmpfs -o mode=755 none {self.home}/view"
        for number, (device, mode) in enumerate(self.devices.items()):
            rdev = os.stat(device).st_rdev
            node = f"{self.home}/view/{number}"
            yield f"mknod -m {mode:o} {node} c {os.major(rdev)} {os.minor(rdev)} && mount --bind {node} {device}"
        closed = {path: ancestor for path in self._needed() if (ancestor := first_closed(path))}
        for number, path in enumerate(closed):
            yield f"mkdir {self.home}/view/p{number} && mount --bind {path} {self.home}/view/p{number}"
        for ancestor in set(closed.values()):
            yield f"mount -t tmpfs -o mode=755 none {ancestor}"
        for number, path in enumerate(closed):
            yield f"mkdir -p {path} && mount --move {self.home}/view/p{number} {path}"

    def _needed(self) -> set[Path]:
        build = {path.resolve() for path in (ROOT / "build").iterdir()}
        return {Path(sys.base_prefix), Path(sys.prefix), ROOT, *build}

    def run(self, *command: str, code: int = 0, typed: str = "") -> str:
        """What a command prints, having ended with `code`; of one that is to fail, what it prints about that."""
        pipe = subprocess.PIPE
        with self.start(*command, stdin=pipe, stdout=pipe, stderr=pipe) as process:
            out, err = process.communicate(typed, timeout=TIMEOUT_S)
        assert process.returncode == code, err
        assert "Traceback" not in err
        return out if code == 0 else err

    def qsnap(self, *words: str, code: int = 0, typed: str = "") -> str:
        """The same for a command of qsnap."""
        return self.run(sys.executable, "-m", "qsnap.cli", *words, code=code, typed=typed)

    def json(self, *words: str) -> Any:
        """What a command of qsnap answers, as a value."""
        return json.loads(self.qsnap(*words, "--json"))

    def processes(self) -> list[str]:
        """The command lines of what runs as this user. A process that was ended a moment ago is given a second."""
        deadline = time.monotonic() + 1
        while (found := _command_lines(self.uid)) and time.monotonic() < deadline:
            time.sleep(0.02)
        return found

    def files(self) -> set[str]:
        """Files and sockets in the user's directories, outside the store."""
        paths = (path for path in self.home.rglob("*") if not path.is_dir())
        return {str(path.relative_to(self.home)) for path in paths if not path.is_relative_to(self.place.store)}


def first_closed(path: Path) -> Path | None:
    """The topmost directory above `path` that only its owner may enter."""
    above = reversed(path.parents)
    return next((directory for directory in above if not directory.stat().st_mode & 0o001), None)


def _command_lines(uid: int) -> list[str]:
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if directory.stat().st_uid == uid and (line := (directory / "cmdline").read_bytes()):
                found.append(line.replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@contextmanager
def ordinary_user(uid: int) -> Iterator[OrdinaryUser]:
    """A user who has nothing yet; afterwards nothing of theirs may be left."""
    with tempfile.TemporaryDirectory(prefix="qsnap-", dir="/var/tmp") as home:
        user = OrdinaryUser(uid, Path(home))
        for path, mode in ((home, 0o700), (f"{home}/run", 0o700), (f"{home}/view", 0o755)):
            os.makedirs(path, exist_ok=True)
            os.chmod(path, mode)
            os.chown(path, uid, uid)
        yield user
        for vne in user.place.runtime().names():
            user.qsnap("down", vne)
        assert not user.processes(), "a process was left behind"
        assert {name for name in user.files() if not name.endswith(".lock")} == set(), "a file was left behind"
