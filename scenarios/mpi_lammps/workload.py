"""LAMMPS on all guests: the melting of a crystal (`in.melt`), and how far it is by the lines in its log."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from attrs import define

from scenarios import mpi
from scenarios.mpi_lammps.check import Outcome, check, parse_log
from scenarios.processes import measure_job, read_workers
from scenarios.scenario import Scenario
from testbed.shell import GuestShell

INPUT = Path(__file__).with_name("in.melt").read_text()
LOG = "log.melt"
PROGRAM = "lmp -in in.melt -log {log} -screen none -var cells {cells} -var every {every} -var steps {steps}"
LONGEST_WAIT_MS = 32
LINES = 100  #: at least, where there are as many steps
#: Cells of four atoms in each direction, and steps.
WHOLE, SHORT = (8, 1000), (6, 1500)
SHORT_VMS = 2  #: with more, a step takes longer: all wait for all, on the same processors
LINE = r"^ *[0-9]\+ \+[0-9.]\+ "
READ = f"cd {mpi.DIRECTORY} && sha256sum <atoms | cut -c 1-64 && cat {LOG}"
#: The last digit of a line that is somewhere in the middle is another one.
SPOIL = f"cd {mpi.DIRECTORY} && sed -i '/^ *{{step}} /y/0123456789/1234567890/' {LOG}"


@define
class Melt:
    """The guests at their work."""

    shells: Mapping[str, GuestShell]
    cells: int
    steps: int
    every: int  #: so many steps a line is written

    @property
    def logs(self) -> str:
        """The command that prints what the programs said last."""
        return mpi.LOGS

    async def start(self) -> None:
        """Start all ranks."""
        program = PROGRAM.format(log=LOG, cells=self.cells, every=self.every, steps=self.steps)
        await mpi.start_ranks(self.shells, program, {"in.melt": INPUT}, LONGEST_WAIT_MS)

    async def progress(self) -> dict[str, float]:
        """The share of the lines that are written, at the guest that writes them; the last is of the last step."""
        rank, lines = mpi.first(self.shells), self.steps // self.every + 1
        return {rank.name: await measure_job(rank, LINE, f"{mpi.DIRECTORY}/{LOG}", lines)}

    async def outcome(self) -> Outcome:
        """What was written."""
        atoms_sha256, _, text = (await mpi.first(self.shells).run(READ)).partition("\n")
        return parse_log(text, self.steps, atoms_sha256, await read_workers(self.shells))

    async def spoil(self) -> None:
        """For the negative control: change the line of the last step."""
        await mpi.first(self.shells).run(SPOIL.format(step=self.steps))


def make(shells: Mapping[str, GuestShell], short: bool) -> Melt:
    """The cluster of these guests."""
    cells, steps = SHORT if short else WHOLE
    if short:
        steps = int(steps * (SHORT_VMS / len(shells)) ** 0.5)
    every = max(1, steps // LINES)
    return Melt(shells, cells, steps // every * every, every)


SCENARIO = Scenario(
    name="mpi_lammps",
    claim="Molecules in LAMMPS that are saved in the middle, destroyed and restored move on, the same in every digit.",
    make=make,
    check=check,
    fewest_vms=2,
    short_vms=SHORT_VMS,
    usual_vms=4,
)
