"""Programs of MPI on guests: a rank on each, started over SSH from the first and joined by TCP."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from scenarios.processes import MAKE_WATCHED, start_job
from scenarios.ssh import FIRST_S, SSH, serve_ssh
from testbed.shell import GuestShell, run_everywhere

DIRECTORY = "/srv/work"  #: where the ranks run; what the first leaves there is what comes of the work
#: A rank that waits looks for messages all the time, and so takes processor time from the one that is waited for. With
#: this library it waits in the kernel.
WAIT = Path(__file__).with_name("wait.c").read_text()
PREPARE = """\
rm -rf {directory} && mkdir -p {directory}
gcc -O -shared -fPIC -o /run/patient.so -x c - <<'END'
{library}
END
"""
RUN = (
    "mpirun --allow-run-as-root --hostfile /run/hosts --map-by node --bind-to none"
    f" --mca plm_rsh_agent '{SSH}' --mca plm_rsh_no_tree_spawn 1 --mca plm_rsh_num_concurrent 2"  # processors are few
    " --mca pml ob1 --mca btl tcp,self --mca btl_tcp_if_include eth0 --mca oob_tcp_if_include eth0"
    " --mca mpi_yield_when_idle 1"
    " /run/watched nice env LD_PRELOAD=/run/patient.so {program}"  # so that the guest answers meanwhile
)
LOGS = f"tail -n 30 /run/job.log {DIRECTORY}/*; ss -tn | head -n 40; ps -ef | tail -n 30"


def address(name: str) -> str:
    """The address of `node-7`, 10.1.0.7."""
    return f"10.1.0.{name.removeprefix('node-')}"


async def start_ranks(
    shells: Mapping[str, GuestShell], program: str, files: Mapping[str, str], longest_ms: int
) -> None:
    """Start a program as a rank on each guest, beside files that the first one has, by name.

    A rank that finds no message waits for up to `longest_ms` for one before it goes on: long where it only looks for
    messages when it has nothing else to do, short where it looks for them while it works.
    """
    await serve_ssh(shells)
    prepare = PREPARE.format(directory=DIRECTORY, library=f"#define LONGEST_MS {longest_ms}\n{WAIT}")
    await run_everywhere(shells.values(), prepare + MAKE_WATCHED, limit_s=FIRST_S)
    written = [f"cat >{DIRECTORY}/{name} <<'END'\n{text}END" for name, text in files.items()]
    hosts = "\n".join(f"{address(name)} slots=1" for name in shells)
    await first(shells).run("\n".join((*written, f"cat >/run/hosts <<'END'\n{hosts}\nEND")))
    await start_job(first(shells), RUN.format(program=program), DIRECTORY)


def first(shells: Mapping[str, GuestShell]) -> GuestShell:
    """The guest that starts the others and has rank 0."""
    return next(iter(shells.values()))
