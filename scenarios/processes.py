"""Processes that a workload must not lose: who began, and who was there to the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

from attrs import frozen

from scenarios.history import Finding, History, Run
from testbed.shell import GuestShell, run_everywhere

T = TypeVar("T")

BUSY_S = 240.0  #: what a guest that computes may take to answer, on a busy host


@frozen
class Worker:
    """A guest's part of the work. A process is its number and when it started, in clock ticks of the guest."""

    guest: str
    began: tuple[str, ...]  #: every process that was started for it
    ended: str  #: the one that came to its end with nothing wrong, or ""


def parse_worker(guest: str, text: str) -> Worker:
    """What /run/watched has left: lines of `began PROCESS` and `ended PROCESS STATUS`."""
    lines = [line.split() for line in text.splitlines()]
    ended = [words[1] for words in lines if words[0] == "ended" and words[2] == "0"]
    return Worker(guest, tuple(words[1] for words in lines if words[0] == "began"), "".join(ended))


#: Makes /run/watched, which runs a program and keeps in /run/worker who began and who ended.
MAKE_WATCHED = """\
rm -f /run/worker
cat >/run/watched <<'WATCHED'
#!/bin/bash
self=$$:$(cut -d ' ' -f 22 /proc/$$/stat)
echo "began $self" >>/run/worker
"$@"
status=$?
echo "ended $self $status" >>/run/worker
exit $status
WATCHED
chmod +x /run/watched
"""
START = """\
rm -f /run/job.status && cd {directory}
(
  setsid {command} >/run/job.log 2>&1
  echo $? >/run/job.status
) &
"""
#: How many lines match, and whether the job is over; or the status of what failed, and what was said.
LOOK = """\
status=$(cat /run/job.status 2>/dev/null || echo 0)
if [[ $status != 0 ]]; then tail -n 20 /run/job.log; exit "$status"; fi
cat {file} 2>/dev/null | grep -c '{pattern}' || true
[[ ! -e /run/job.status ]] || echo over
"""

AWAIT_END = """\
for ((tenths = 0; tenths < 300; tenths++)); do ! grep -q ^ended /run/worker || break; sleep 0.1; done
cat /run/worker
"""


async def start_job(shell: GuestShell, command: str, directory: str) -> None:
    """Start what does the work, or has it done, on one guest. What it says is in /run/job.log."""
    await shell.run(START.format(command=command, directory=directory))


async def measure_job(shell: GuestShell, pattern: str, file: str, lines: int) -> float:
    """The share of the lines of a file that are there, of those that match; it is 1 when the job is over.

    Raises GuestShellError if it failed, with what it said.
    """
    count, *over = (await shell.run(LOOK.format(pattern=pattern, file=file), limit_s=BUSY_S)).split()
    return 1.0 if over else min(int(count) / lines, 0.99)


async def read_workers(shells: Mapping[str, GuestShell]) -> tuple[Worker, ...]:
    """What /run/watched has kept, on each guest, once all have ended or been given time for it."""
    told = await run_everywhere(shells.values(), AWAIT_END, limit_s=BUSY_S)
    return tuple(parse_worker(name, text) for name, text in zip(shells, told, strict=True))


def check_workers(history: History[T], workers: Callable[[T], tuple[Worker, ...]]) -> Finding:
    """Whether nobody was started again, neither in a run nor by a restore. `workers` finds them in an outcome."""
    expected = {worker.guest: worker.ended for worker in workers(history.snapshotted.outcome)}
    faults = [
        *(fault for run in history.runs for fault in _restarted(run, workers(run.outcome), set(expected))),
        *(fault for run in history.restored for fault in _others(run, workers(run.outcome), expected)),
    ]
    return Finding(
        "What was restored went on: the processes that began the work ended it, and none was started again.",
        tuple(faults),
        f"{len(expected)} processes on as many guests",
    )


def _restarted(run: Run[T], workers: tuple[Worker, ...], guests: set[str]) -> Iterator[str]:
    if {worker.guest for worker in workers} != guests or not guests:
        yield f"{run.title}: {len(workers)} guests had a part in the work, not {len(guests)}"
    for worker in workers:
        if worker.began != (worker.ended,):
            began, ended = " and ".join(worker.began) or "nothing", worker.ended or "nothing"
            yield f"{run.title}: on {worker.guest} {began} began and {ended} came to a good end"


def _others(run: Run[T], workers: tuple[Worker, ...], expected: dict[str, str]) -> Iterator[str]:
    for worker in workers:
        if expected.get(worker.guest) != worker.ended:
            yield f"{run.title}: {worker.guest} ended with process {worker.ended}, not {expected.get(worker.guest)}"
