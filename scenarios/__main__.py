"""python -m scenarios: list what there is, or run one."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path

import cattrs
import click

import qsnap
from qsnap.cli.signals import run_until_signal
from scenarios.page import write_page
from scenarios.running import ENGINES, Options, Result, run_scenario
from scenarios.scenario import Scenario, load, names
from testbed.screen import Screen

ROOT = Path(__file__).resolve().parents[1]
CUTS = tuple(qsnap.Cut)


@click.group()
def main() -> None:
    """Real programs on networks of VMs: snapshots of them in the middle of their work, restored, judged by what comes
    of it."""


@main.command("list")
def list_() -> None:
    """Show the scenarios."""
    screen = Screen()
    for name in names():
        scenario = load(name)
        screen.say(f"{name} ({size(scenario)})", "bold")
        screen.say(f"   {scenario.claim}")


def size(scenario: Scenario) -> str:
    """How many VMs there are, which only a description tells whose files are there."""
    try:
        return f"{len(scenario.vne().vms)} VMs"
    except qsnap.ConfigError:
        return "its guests are not built yet"


@main.command()
@click.argument("name", type=click.Choice(names()))
@click.option("--hosts", type=click.Choice(["netns"]), help="Spread the VMs over two hosts, each a network namespace.")
@click.option("--vms", type=int, default=0, help="Take only the first VMs of the description.")
@click.option("--engine", type=click.Choice([each.value for each in ENGINES]), multiple=True, help="Default: all.")
@click.option("--cut", type=click.Choice([each.value for each in CUTS]), multiple=True, help="Default: both.")
@click.option("--snapshots", type=click.IntRange(1), help="How many are taken.  [default: the scenario's own]")
@click.option("--short", is_flag=True, help="Less work, on few VMs.")
@click.option("--page", type=click.Path(dir_okay=False, path_type=Path), help="[default: build/scenarios/NAME.html]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON, and nothing else to standard output.")
def run(
    name: str,
    hosts: str | None,
    vms: int,
    engine: tuple[str, ...],
    cut: tuple[str, ...],
    snapshots: int | None,
    short: bool,
    page: Path | None,
    as_json: bool,
) -> None:
    """Run a scenario: uninterrupted, with snapshots, and from each of them again. Exits with 1 if its claim fails."""
    engines = tuple(qsnap.Engine(each) for each in engine) or ENGINES
    cuts = tuple(qsnap.Cut(each) for each in cut) or CUTS
    scenario = load(name)
    usual = max(len(engines), len(cuts))
    count = snapshots or (usual if short else scenario.snapshots or usual)
    options = Options(vms, hosts or "", engines, cuts, count, short)
    page = page or ROOT / f"build/scenarios/{name}.html"
    screen = Screen(to_stderr=as_json)
    try:
        result = run_until_signal(partial(run_scenario, scenario, options, screen))
    except qsnap.QsnapError as error:
        screen.fault(str(error))
        sys.exit(error.exit_code)
    write_page(result, page)
    show(result, screen)
    screen.say(f"The whole result: {page}", "dim")
    if as_json:
        print(json.dumps(cattrs.unstructure(result), indent=1))
    sys.exit(not result.held)


def show(result: Result, screen: Screen) -> None:
    """What was found."""
    screen.say()
    for finding in result.findings:
        (screen.mark if finding.held else screen.fault)(finding.claim)
        for line in finding.faults or (finding.evidence,):
            if line:
                screen.say(f"   {line}", "dim")
    if result.failure is not None:
        screen.fault("It came to no end; consoles and logs are in the page.")
    screen.say()


if __name__ == "__main__":
    main()
