"""QEMU's block jobs. A job outlives the qsnap that started it, so each is found again by its id.

Jobs are started with `auto-dismiss` off: one that has ended stays, with its error, until somebody has seen it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import trio

from qsnap.errors import QemuError
from qsnap.host.qmp import Qmp, QmpError

POLL_S = 0.01
Report = Callable[[int, int], None]  #: is told the bytes done, and the bytes to do in all


class JobError(QemuError):
    """A block job ended with an error."""


async def find_job(qmp: Qmp, job: str) -> dict[str, Any] | None:
    """What QEMU says of a job, or None where there is none of that id."""
    return next((each for each in await qmp.execute("query-jobs") if each["id"] == job), None)


async def find_jobs(qmp: Qmp, jobs: Sequence[str]) -> list[str]:
    """Those of these jobs that there are."""
    known = {each["id"] for each in await qmp.execute("query-jobs")}
    return [job for job in jobs if job in known]


async def wait_job(qmp: Qmp, job: str, doing: str, report: Report | None = None) -> None:
    """Return once a job has ended and is dismissed; one that waits for it is completed. No job, no wait.

    Raises JobError with the job's error, if it has one.
    """
    completed = False
    while (state := await find_job(qmp, job)) is not None and state["status"] != "concluded":
        if report is not None:
            report(state["current-progress"], state["total-progress"])
        if state["status"] == "ready" and not completed:
            completed = True
            with suppress(QmpError):  # it has ended since it was looked at
                await qmp.execute("job-complete", {"id": job})
        await trio.sleep(POLL_S)
    if state is None:
        return
    await qmp.execute("job-dismiss", {"id": job})
    if "error" in state:
        raise JobError(f"cannot {doing}: {state['error']}", where=f"VM {qmp.vm}")


async def end_job(qmp: Qmp, job: str) -> None:
    """Cancel a job, if there is one, and return once it is gone."""
    state = await find_job(qmp, job)
    if state is not None and state["status"] in ("created", "running", "paused", "ready", "standby"):
        with suppress(QmpError):  # the same
            await qmp.execute("block-job-cancel", {"device": job, "force": True})
    with suppress(JobError):
        await wait_job(qmp, job, "end a job")
