"""What a scenario is: guests, work for them, and a judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from attrs import evolve, frozen

import qsnap
from scenarios.history import Finding, History

HERE = Path(__file__).resolve().parent
#: What is missing where a description is right.
BUILD = "Build the guests: scripts/setup, then scripts/images with the name of the file, or without one for all."


class Workload(Protocol):
    """Programs at work in guests. All of it goes on by itself: a call looks at it, or sets it going."""

    @property
    def logs(self) -> str:
        """The command that prints what the programs of a guest have said, for the case that they fail."""

    async def start(self) -> None:
        """Prepare the guests and begin."""

    async def progress(self) -> dict[str, float]:
        """How far each guest has come, from 0 to 1: the work is at its end when all say 1."""

    async def outcome(self) -> Any:
        """What came of it; the scenario's own value, which its check knows."""

    async def spoil(self) -> None:
        """Damage what was made, as little as can be, so that the check has something to find."""


@frozen
class Scenario:
    """A workload on a VNE, and what is claimed of it.

    Attributes:
        make: the workload, of the guests and whether the run is short. They are shells, or consoles of test guests.
        judge: what the files of each VM's RAM in a snapshot say; the check finds it in the history.
        epochs: whether the check finds out that one VM was restored from another snapshot than the others. Programs
            that begin all over when a connection breaks may get over that.
        snapshots: how many are taken where nobody says; 0 is one for each engine.
        usual_vms: how many there are where nobody says and the run is not short; 0 is all that are described.
    """

    name: str
    claim: str
    make: Callable[[Mapping[str, Any], bool], Workload]
    check: Callable[[History[Any]], tuple[Finding, ...]]
    fewest_vms: int
    short_vms: int
    shells: bool = True
    judge: Callable[[Mapping[str, Sequence[Path]]], Any] | None = None
    epochs: bool = True
    snapshots: int = 0
    usual_vms: int = 0

    def vne(self, vms: int = 0) -> qsnap.VNE:
        """What vne.toml describes, or the first VMs of it.

        Raises ConfigError if that is too few or more than all, or its guests are not built.
        """
        try:
            whole = qsnap.load_description(HERE / self.name / "vne.toml")
        except qsnap.ConfigError as error:
            error.advice = BUILD
            raise
        if vms and not self.fewest_vms <= vms <= len(whole.vms):
            message = f"{self.name} runs on {self.fewest_vms} to {len(whole.vms)} VMs, not on {vms}"
            raise qsnap.ConfigError(message, file=f"scenarios/{self.name}/vne.toml", line=0, key="")
        return evolve(whole, vms=whole.vms[: vms or None])


def names() -> list[str]:
    """The scenarios that there are."""
    return sorted(path.parent.name for path in HERE.glob("*/workload.py"))


def load(name: str) -> Scenario:
    """A scenario by name; KeyError where there is none."""
    if name not in names():
        raise KeyError(name)
    scenario: Scenario = import_module(f"scenarios.{name}.workload").SCENARIO
    return scenario
