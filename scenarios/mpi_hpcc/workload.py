"""The HPC Challenge on all guests: hpcc as Debian has it, and how far it is by what it has written."""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from pathlib import Path

from attrs import define

from scenarios import mpi
from scenarios.mpi_hpcc.check import Outcome, System, check, parse_output
from scenarios.processes import measure_job, read_workers
from scenarios.scenario import Scenario
from testbed.shell import GuestShell

INPUT = Path(__file__).with_name("hpccinf.txt").read_text()
OUTPUT = "hpccoutf.txt"
#: Orders of the systems of equations. Each is solved in blocks of both sizes, with each of six ways to spread a panel.
WHOLE, SHORT = (64, 96, 128), (64, 96)
BLOCKS = (8, 12)
BROADCASTS = 6
PARTS = 21  #: benchmarks, a summary, and kinds of messages
LONGEST_WAIT_MS = 8
DONE = r"^End of .* section\|^Message Length"  #: systems are not counted one by one: they take the last second
#: A residual is another one, and one check failed.
SPOIL = f"cd {mpi.DIRECTORY} && sed -i '0,/)=  .*PASSED/s/)=  .*PASSED/)=        99.0000000 ...... FAILED/' {OUTPUT}"


def plan_systems(orders: tuple[int, ...], ranks: int) -> tuple[System, ...]:
    """The systems of equations in the order in which hpcc solves them, on a grid as square as can be."""
    rows = next(rows for rows in range(isqrt(ranks), 0, -1) if ranks % rows == 0)
    grid = rows, ranks // rows
    return tuple(System(order, block, *grid) for order in orders for block in BLOCKS for _ in range(BROADCASTS))


def encode_input(systems: tuple[System, ...]) -> str:
    """What hpcc reads."""
    orders = sorted({system.order for system in systems})
    return INPUT.format(
        count=len(orders),
        orders=" ".join(map(str, orders)),
        blocks=" ".join(map(str, BLOCKS)),
        rows=systems[0].rows,
        columns=systems[0].columns,
    )


@define
class Challenge:
    """The guests at their work."""

    shells: Mapping[str, GuestShell]
    systems: tuple[System, ...]

    @property
    def logs(self) -> str:
        """The command that prints what the programs said last."""
        return mpi.LOGS

    async def start(self) -> None:
        """Start all ranks."""
        await mpi.start_ranks(self.shells, "hpcc", {"hpccinf.txt": encode_input(self.systems)}, LONGEST_WAIT_MS)

    async def progress(self) -> dict[str, float]:
        """The share of what is to be written, at the guest that writes it."""
        rank = mpi.first(self.shells)
        return {rank.name: await measure_job(rank, DONE, f"{mpi.DIRECTORY}/{OUTPUT}", PARTS)}

    async def outcome(self) -> Outcome:
        """What was written."""
        text = await mpi.first(self.shells).run(f"cat {mpi.DIRECTORY}/{OUTPUT}")
        return parse_output(text, self.systems, await read_workers(self.shells))

    async def spoil(self) -> None:
        """For the negative control: change a residual."""
        await mpi.first(self.shells).run(SPOIL)


def make(shells: Mapping[str, GuestShell], short: bool) -> Challenge:
    """The cluster of these guests."""
    return Challenge(shells, plan_systems(SHORT if short else WHOLE, len(shells)))


SCENARIO = Scenario(
    name="mpi_hpcc",
    claim="The HPC Challenge that is saved in its middle, destroyed and restored finds the same, and finds it right.",
    make=make,
    check=check,
    fewest_vms=2,
    short_vms=2,
    usual_vms=4,
)
