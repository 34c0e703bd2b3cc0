"""R on all guests: the first starts workers on the others with snow and computes with them in rounds (`rounds.R`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from attrs import define

from scenarios.processes import MAKE_WATCHED, measure_job, read_workers, start_job
from scenarios.rounds import Outcome, check
from scenarios.scenario import Scenario
from scenarios.ssh import SSH, serve_ssh
from testbed.shell import GuestShell, run_everywhere

SCRIPT = Path(__file__).with_name("rounds.R").read_text()
WHOLE, SHORT = 1000, 300  #: rounds
ROUNDS = "/srv/rounds"  #: where a line is for each
PREPARE = f"""\
{MAKE_WATCHED}
printf '#!/bin/sh\\nexec /run/watched Rscript "$@"\\n' >/run/rscript && chmod +x /run/rscript
rm -f /srv/rounds
cat >/run/rounds.R <<'END'
{SCRIPT}END
"""
RUN = f"env RSH='{SSH}' /run/rscript /run/rounds.R {{rounds}} {{hosts}}"
LOGS = "tail -n 20 /run/*.log; ss -tn | head -n 30; ps -ef | tail -n 20"
SPOIL = "sed -i '$ y/0123456789/1234567890/' /srv/rounds"


@define
class Snow:
    """The guests at their work."""

    shells: Mapping[str, GuestShell]
    rounds: int

    @property
    def logs(self) -> str:
        """The command that prints what the programs said last."""
        return LOGS

    @property
    def master(self) -> GuestShell:
        """The guest that has the others work."""
        return self.shells["node-1"]

    async def start(self) -> None:
        """Start the master, which starts the workers."""
        await serve_ssh(self.shells)
        await run_everywhere(self.shells.values(), PREPARE)
        hosts = " ".join(f"10.1.0.{name.removeprefix('node-')}" for name in self.shells if name != "node-1")
        await start_job(self.master, RUN.format(rounds=self.rounds, hosts=hosts), "/run")

    async def progress(self) -> dict[str, float]:
        """The share of the rounds that are done, at the guest that writes them down."""
        return {self.master.name: await measure_job(self.master, "^", ROUNDS, self.rounds)}

    async def outcome(self) -> Outcome:
        """What came of each round."""
        lines = (await self.master.run("cat /srv/rounds")).splitlines()
        return Outcome(self.rounds, tuple(line.strip() for line in lines), await read_workers(self.shells))

    async def spoil(self) -> None:
        """For the negative control: change the last round."""
        await self.master.run(SPOIL)


def make(shells: Mapping[str, GuestShell], short: bool) -> Snow:
    """Master and workers of these guests."""
    return Snow(shells, SHORT if short else WHOLE)


SCENARIO = Scenario(
    name="r_snow",
    claim="A cluster of R that is saved between its rounds or within, destroyed and restored computes the same on.",
    make=make,
    check=check,
    fewest_vms=2,
    short_vms=3,
)
