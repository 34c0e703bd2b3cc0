"""A fleet to test with: an agent on each host of a test bed, a process of its own, and what makes them a fleet."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import trio
from attrs import define, evolve, field

import qsnap
from qsnap.fleet.pki import init_ca, issue
from qsnap.host.netns import entered

PORT = 7907
INITIATOR = "initiator"
START_S = 30.0
END_S = 60.0


T = TypeVar("T")


class CommandError(Exception):
    """A command of qsnap has failed: its exit code, and what it said."""


class FleetHost(Protocol):
    """A host of any test bed: where it is reached, and how a command is run on it."""

    @property
    def name(self) -> str: ...
    @property
    def address(self) -> str: ...
    @property
    def tunnel(self) -> str: ...
    def command(self, words: Sequence[str]) -> list[str]:
        """The command line that runs a command on this host."""


@define
class Fleet:
    """Agents on hosts, and a further host, the initiator, which commands come from."""

    root: Path
    hosts: Mapping[str, FleetHost]
    initiator: FleetHost
    program: Sequence[str] = ("-m", "qsnap.cli")  #: what Python runs as an agent
    agents: dict[str, subprocess.Popen[str]] = field(factory=dict)

    def place(self, host: str = INITIATOR) -> qsnap.Place:
        """Where one of the hosts keeps things."""
        home = self.root / host
        return qsnap.Place(run=home / "run", store=home / "store", identity=self.root / "ca" / f"{host}.pem")

    @property
    def table(self) -> tuple[qsnap.Host, ...]:
        """The hosts, as a description has them."""
        return tuple(qsnap.Host(host.name, host.address, PORT, host.tunnel) for host in self.hosts.values())

    def spread(self, vne: qsnap.VNE) -> qsnap.VNE:
        """The VNE with its VMs dealt out to the hosts in turn."""
        names = list(self.hosts)
        vms = tuple(evolve(vm, host=names[index % len(names)]) for index, vm in enumerate(vne.vms))
        return evolve(vne, vms=vms, hosts=self.table)

    async def start(self, host: str) -> None:
        """Start an agent, and wait until it listens."""
        place = self.place(host)
        place.run.parent.mkdir(exist_ok=True)
        words = ["--port", str(PORT), "--run-dir", place.run, "--store", place.store, "--identity", place.identity]
        program = [sys.executable, "-X", "faulthandler", *self.program]
        command = self.hosts[host].command([*program, "agent", *map(str, words)])
        log = (self.root / f"{host}.log").open("ab")
        with log:
            spawn = partial(
                subprocess.Popen,
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                stdin=subprocess.DEVNULL,
                text=True,
                start_new_session=True,  # a Ctrl-C is not for them: they are needed to take all down
            )
            agent = await trio.to_thread.run_sync(spawn)
        self.agents[host] = agent
        assert agent.stdout is not None
        with trio.fail_after(START_S):
            line = await trio.to_thread.run_sync(agent.stdout.readline, abandon_on_cancel=True)
        if "Listening" not in line:
            raise RuntimeError(f"the agent of {host} did not start: {self.log(host)}")

    async def kill(self, host: str) -> None:
        """Kill an agent as a power failure would."""
        self.agents[host].send_signal(signal.SIGKILL)
        await self.wait(host)

    async def wait(self, host: str) -> None:
        """Until an agent has ended. Raises RuntimeError if it does not, with what it is at."""
        agent = self.agents.pop(host)
        with agent, trio.CancelScope(shield=True):
            try:
                await trio.to_thread.run_sync(agent.wait, END_S)
            except subprocess.TimeoutExpired as error:
                for number in (signal.SIGABRT, signal.SIGCONT):  # it says in its log where it is (-X faulthandler)
                    agent.send_signal(number)
                await trio.to_thread.run_sync(agent.wait)
                raise RuntimeError(f"the agent of {host} did not end: {self.log(host)}") from error

    async def run(self, *words: str, program: Sequence[str] = ("-m", "qsnap.cli")) -> Any:
        """Run a command of qsnap on the initiator, and return what it answers. Raises CommandError if it fails."""
        place = self.place()
        options = ["--run-dir", place.run, "--store", place.store, "--identity", place.identity, "--json"]
        command = self.initiator.command([sys.executable, *program, *words, *map(str, options)])
        done = await trio.run_process(command, capture_stdout=True, capture_stderr=True, check=False)
        if done.returncode:
            raise CommandError(done.returncode, (done.stdout + done.stderr).decode())
        return json.loads(done.stdout)

    async def call(self, function: Callable[..., Awaitable[T]], *args: Any, **kwargs: Any) -> T:
        """Call a function of the library on the initiator, in a thread that is there."""

        def inside() -> T:
            with entered(self.initiator.command([])[1].removeprefix("--net=")):
                return trio.run(partial(function, *args, place=self.place(), **kwargs))

        return await trio.to_thread.run_sync(inside)

    def log(self, host: str) -> str:
        """What an agent has said."""
        return (self.root / f"{host}.log").read_text()


@asynccontextmanager
async def open_fleet(
    root: Path, hosts: Mapping[str, FleetHost], *, program: Sequence[str] = ("-m", "qsnap.cli")
) -> AsyncIterator[Fleet]:
    """Agents on all of these hosts but the initiator, and identities of a new authority below `root`."""
    init_ca(root / "ca")
    for name in hosts:
        issue(root / "ca", name)
    fleet = Fleet(root, {name: host for name, host in hosts.items() if name != INITIATOR}, hosts[INITIATOR], program)
    (root / INITIATOR).mkdir()
    try:
        async with trio.open_nursery() as nursery:
            for name in fleet.hosts:
                nursery.start_soon(fleet.start, name)
        yield fleet
    finally:
        for agent in fleet.agents.values():
            agent.terminate()
        for name in list(fleet.agents):
            await fleet.wait(name)
