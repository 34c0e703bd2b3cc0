"""An agent or a command that kills itself with SIGKILL before a given step, for as long as it is armed.

    python -m tests.live.fleet_killing FILE WHAT ARGUMENTS...

The arguments are those of `qsnap`. It is armed while FILE exists, whose first line is the number of the fatal step, or
how its name begins; each step that is taken meanwhile is a further line. A step is a message sent or received; where
WHAT is `all`, and not `messages`, also a phase, or a record written: what lies between two of them no other host sees.
What it does to VMs and networks meanwhile is the subject of `tests.live.killing`.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Awaitable, Callable
from functools import wraps
from pathlib import Path
from typing import Any

from qsnap.cli import main
from qsnap.fleet.channel import Connection
from qsnap.fleet.participants import Local
from qsnap.host.journal import Journal
from qsnap.host.runtime import Runtime
from qsnap.host.store import Store
from qsnap.wire.messages import ClockProbe, ClockReply, Message, Ping, Progressed

UNIMPORTANT = (ClockProbe, ClockReply, Ping, Progressed)  #: they change nothing, and there are many
RECORDS = (
    (Journal, "_write"),
    (Journal, "end"),
    (Runtime, "save"),
    (Runtime, "forget"),
    (Store, "begin"),
    (Store, "hold"),
    (Store, "commit"),
    (Store, "collect"),
)
END = Journal.end
WORK = ((Local, "perform"), (Local, "commit"), (Local, "undo"))


def arm(file: Path, fatal: int | str) -> None:
    """Have whoever watches the file die before the step of this number or name."""
    file.write_text(f"{fatal}\n")


def disarm(file: Path) -> list[str]:
    """The steps that were begun; the last one is fatal if there are as many as was said."""
    steps = file.read_text().splitlines()[1:]
    file.unlink()
    return steps


def begin(file: Path, step: str) -> None:
    """Take note of a step that begins now."""
    try:
        fatal, *before = file.read_text().splitlines()
    except FileNotFoundError:
        return
    with file.open("a") as steps:
        steps.write(f"{step}\n")
    if fatal == str(len(before) + 1) or step.startswith(fatal):
        os.kill(os.getpid(), signal.SIGKILL)


def watch_calls(owner: type, name: str, file: Path) -> None:
    """Count the calls of a method."""
    function: Callable[..., Any] = getattr(owner, name)

    @wraps(function)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        if function is not END or self.path.exists():
            what = [str(getattr(each, "value", each)) for each in (*args, *kwargs.values())]
            begin(file, " ".join([owner.__name__, name.strip("_"), *what])[:60])
        return function(self, *args, **kwargs)

    setattr(owner, name, watched)


def watch_messages(file: Path) -> None:
    """Count what is sent, and what is received, on all connections."""
    send: Callable[[Connection, Message], Awaitable[None]] = Connection.send
    receive: Callable[[Connection], Awaitable[Message]] = Connection.receive

    def count(verb: str, message: Message, peer: str) -> None:
        if not isinstance(message, UNIMPORTANT):
            begin(file, f"{verb} {type(message).__name__} {peer}")

    async def watched_send(self: Connection, message: Message) -> None:
        count("send", message, self.peer.name)
        await send(self, message)

    async def watched_receive(self: Connection) -> Message:
        message = await receive(self)
        count("receive", message, self.peer.name)
        return message

    Connection.send = watched_send  # type: ignore[method-assign]
    Connection.receive = watched_receive  # type: ignore[method-assign]


def run(file: str, what: str, *arguments: str) -> None:
    for owner, name in RECORDS + WORK if what == "all" else ():
        watch_calls(owner, name, Path(file))
    watch_messages(Path(file))
    sys.argv[1:] = arguments
    sys.exit(main())


if __name__ == "__main__":
    run(*sys.argv[1:])
