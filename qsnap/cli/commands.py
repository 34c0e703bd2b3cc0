"""The commands. Each calls one function of the library and says how its answer looks; nothing is decided here."""

from __future__ import annotations

import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from enum import Enum
from functools import partial
from typing import Any, TypeVar

import click
from click.shell_completion import BashComplete, FishComplete, ShellComplete, ZshComplete

import qsnap
from qsnap.cli import tables
from qsnap.cli.bars import progress_bars
from qsnap.cli.group import MOST_COLUMNS, Program
from qsnap.cli.hosts import agent, hosts
from qsnap.cli.names import complete_running, complete_saved, complete_snapshots, complete_vms
from qsnap.cli.output import Answer, print_answer
from qsnap.cli.pki import pki
from qsnap.cli.settings import Settings, vne_named
from qsnap.cli.signals import run_until_signal
from qsnap.host import console as terminal
from qsnap.host.domains import SYSTEM

T = TypeVar("T")
E = TypeVar("E", bound=Enum)
F = TypeVar("F", bound=Callable[..., Any])

SHELLS: dict[str, type[ShellComplete]] = {"bash": BashComplete, "zsh": ZshComplete, "fish": FishComplete}

running_vne = click.argument("vne", shell_complete=complete_running)
saved_vne = click.argument("vne", shell_complete=complete_saved)
saved_name = click.argument("name", shell_complete=complete_snapshots)


def choice(option: str, values: type[E], default: E, help: str) -> Callable[[F], F]:
    """An option that takes the values of an enum."""
    return click.option(
        option,
        type=click.Choice([str(each.value) for each in values]),
        default=str(default.value),
        show_default=True,
        help=help,
        callback=lambda context, parameter, value: values(value),
    )


def call(settings: Settings, function: Callable[..., Awaitable[T]], *args: object, **kwargs: object) -> T:
    """Run a function of the library to its end, at the place that the options name."""
    place = settings.place
    if not args or not isinstance(args[0], str):
        return run_until_signal(partial(function, *args, place=place, **kwargs))
    with vne_named(args[0], place, moves=function is qsnap.restore) as vne:
        return run_until_signal(partial(function, vne, *args[1:], place=place, **kwargs))


def call_with_bars(settings: Settings, function: Callable[..., Awaitable[T]], *args: object, **kwargs: object) -> T:
    """The same for a function that may take its time."""
    with progress_bars(wanted=not settings.json) as progress:
        return call(settings, function, *args, progress=progress, **kwargs)


@click.group(
    cls=Program,
    examples=("qsnap up lab.toml", "qsnap snapshot lab before", "qsnap down lab", "qsnap restore lab before"),
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": MOST_COLUMNS},
)
@click.version_option(package_name="qsnap", message="%(prog)s %(version)s")
def cli() -> None:
    """Save running virtual networks of QEMU VMs, and restore them.

    A virtual networked environment (VNE) is a set of VMs and the networks between them. All its VMs are saved
    as of one consistent moment, while they run.
    """


@cli.result_callback()
@click.pass_obj
def finish(settings: Settings, answer: Answer | None) -> None:
    """Print what a command answers."""
    if answer is not None:
        print_answer(answer, settings)


@cli.command(example="qsnap up lab.toml")
@click.argument("lab", type=click.Path(), metavar="LAB.toml")
@click.pass_obj
def up(settings: Settings, lab: str) -> Answer:
    """Start the VNE that LAB.toml describes.

    All its VMs and networks live in a network namespace of their own.
    """
    vne = qsnap.load_description(lab)
    status = call_with_bars(settings, qsnap.up, vne)
    console = ("Its console", settings.command_line("console", vne.name, vne.vms[0].name))
    save = ("Save it", settings.command_line("snapshot", vne.name))
    return Answer(status, tables.with_next(tables.statuses_text([status]), console, save))


@cli.command(example="qsnap attach lab.toml")
@click.argument("lab", type=click.Path(), metavar="[LAB.toml]", required=False)
@click.option("--libvirt", "domains", multiple=True, metavar="DOMAIN", help="A running domain; give one or more.")
@click.option("--connect", default=SYSTEM, show_default=True, metavar="URI", help="The libvirt that runs the domains.")
@click.option("--name", default="libvirt", show_default=True, help="What to call the VNE of these domains.")
@click.pass_obj
def attach(settings: Settings, lab: str | None, domains: tuple[str, ...], connect: str, name: str) -> Answer:
    """Make VMs known to qsnap that run already, and that it did not start.

    LAB.toml names the QMP socket of each, which nobody else may use meanwhile, and its taps; or libvirt is asked for
    them. The VMs run on.
    """
    if bool(lab) == bool(domains):
        raise click.UsageError("Give either LAB.toml or --libvirt.")
    vne = (
        qsnap.load_description(lab)
        if lab
        else run_until_signal(partial(qsnap.load_domains, name, domains, connect=connect))
    )
    report = call(settings, qsnap.attach, vne)
    cut = ("--cut", "barrier") if report.barrier_only else ()
    hints = [
        ("Save it", settings.command_line("snapshot", vne.name, *cut)),
        ("Let go of it", settings.command_line("detach", vne.name)),
    ]
    return Answer(report, tables.with_next(tables.attached_text(report), *hints))


@cli.command(example="qsnap detach lab")
@running_vne
@click.pass_obj
def detach(settings: Settings, vne: str) -> Answer:
    """Forget a VNE that qsnap is attached to; its VMs run on."""
    call(settings, qsnap.detach, vne)
    return Answer(None, f"{vne} is detached.")


@cli.command(example="qsnap ps lab")
@click.argument("vne", required=False, shell_complete=complete_running)
@click.pass_obj
def ps(settings: Settings, vne: str | None) -> Answer:
    """Show the VMs of one VNE that is up, or of all."""
    if vne is None:
        everything = call(settings, qsnap.statuses)
        return Answer(everything, tables.statuses_text(everything))
    status = call(settings, qsnap.status, vne)
    return Answer(status, tables.statuses_text([status]))


@cli.command(example="qsnap snapshot lab before-update --cut barrier")
@running_vne
@click.argument("name", required=False)
@choice("--engine", qsnap.Engine, qsnap.Engine.AUTO, "How the state of each VM is captured.")
@choice("--cut", qsnap.Cut, qsnap.Cut.COLOUR, "What makes the states of all VMs one consistent state.")
@choice("--disks", qsnap.DiskEngine, qsnap.DiskEngine.AUTO, "How the disks of each VM are kept.")
@click.pass_obj
def snapshot(
    settings: Settings,
    vne: str,
    name: str | None,
    engine: qsnap.Engine,
    cut: qsnap.Cut,
    disks: qsnap.DiskEngine,
) -> Answer:
    """Save a running VNE as NAME; its VMs run on.

    Without NAME, it is called after the date and time. It is kept in the store that was given to `qsnap up`, on each
    host its part.
    """
    saved = call_with_bars(settings, qsnap.snapshot, vne, name, engine=engine, cut=cut, disks=disks)
    elsewhere = _store_option(settings, saved.vne.name)
    back = settings.command_line("restore", vne, saved.name, **elsewhere)
    if _is_attached(settings, saved.vne.name):
        way = ("Go back to it, once its VMs have ended", f"{settings.command_line('detach', vne)} && {back}")
    else:
        way = ("Go back to it", f"{settings.command_line('down', vne)} && {back}")
    hints = [("Look at it", settings.command_line("show", vne, saved.name, **elsewhere)), way]
    return Answer(saved, tables.with_next(tables.saved_text(saved), *hints))


def _store_option(settings: Settings, vne: str) -> dict[str, str]:
    """What commands on its snapshots need to find them: it came up with a store of its own, maybe."""
    if vne not in settings.place.runtime().names():
        return {}
    store = settings.place.runtime().load(vne).store
    return {} if store == str(settings.place.store) else {"store": store}


def _is_attached(settings: Settings, vne: str) -> bool:
    """Whether its VMs were started by somebody else, who is to end them."""
    runtime = settings.place.runtime()
    return vne in runtime.names() and runtime.load(vne).vne.attached


def _pairs(context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> dict[str, str]:
    pairs = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise click.BadParameter(f"{text!r} is not of the form {parameter.metavar}")
        pairs[key] = value
    return pairs


@cli.command(example="qsnap restore lab before-update --ram eager")
@saved_vne
@saved_name
@choice("--ram", qsnap.RamMode, qsnap.RamMode.AUTO, "Map the saved RAM copy-on-write, or copy it before the VMs run.")
@click.option("--qemu", type=click.Path(), metavar="PATH", help="Take this QEMU instead of the one it was saved with.")
@click.option("--paused", is_flag=True, help="Load the VMs and leave them paused.")
@click.option(
    "--place", "placement", multiple=True, metavar="VM=HOST", callback=_pairs, help="Restore this VM there; give any."
)
@click.pass_obj
def restore(
    settings: Settings,
    vne: str,
    name: str,
    ram: qsnap.RamMode,
    qemu: str | None,
    paused: bool,
    placement: dict[str, str],
) -> Answer:
    """Start a VNE as it was when NAME was saved.

    The VNE must not be running. Where its description names other hosts than the snapshot, or --place does, these fetch
    what they need.
    """
    options = {"ram": ram, "qemu": qemu, "paused": paused, "placement": placement}
    report = call_with_bars(settings, qsnap.restore, vne, name, **options)
    hint = ("Its state", settings.command_line("ps", vne))
    return Answer(report, tables.with_next(tables.restored_text(report, paused=paused), hint))


@cli.command(example="qsnap ls lab")
@click.argument("vne", required=False, shell_complete=complete_saved)
@click.pass_obj
def ls(settings: Settings, vne: str | None) -> Answer:
    """List the snapshots of one VNE or of all, the oldest first."""
    found = call(settings, qsnap.snapshots, vne)
    return Answer(found, tables.snapshots_text(found))


@cli.command(example="qsnap show lab before-update")
@saved_vne
@saved_name
@click.pass_obj
def show(settings: Settings, vne: str, name: str) -> Answer:
    """Show all that is known of a snapshot."""
    saved = call(settings, qsnap.show, vne, name)
    return Answer(saved, tables.details_text(saved))


@cli.command(example="qsnap report lab -o lab.html --png lab.png")
@saved_vne
@click.argument("names", nargs=-1, metavar="[NAME...]", shell_complete=complete_snapshots)
@click.option("-o", "--output", default="report.html", show_default=True, type=click.Path(), help="The page.")
@click.option("--png", default="", type=click.Path(), help="A picture of the same drawings, beside the page.")
@click.pass_obj
def report(settings: Settings, vne: str, names: tuple[str, ...], output: str, png: str) -> Answer:
    """Draw what snapshots cost: a page with the timeline of each VM.

    Of all snapshots of the VNE, or of those named. The page is one file that needs nothing else.
    """
    written = call(settings, qsnap.report, vne, names, page=output, png=png)
    return Answer(written, tables.report_text(written))


@cli.command(example="qsnap verify lab before-update")
@saved_vne
@saved_name
@click.pass_obj
def verify(settings: Settings, vne: str, name: str) -> Answer:
    """Check a snapshot: read every file of it.

    Fails at the first file that is not what was stored.
    """
    saved = call_with_bars(settings, qsnap.verify, vne, name)
    return Answer(saved, tables.verified_text(saved))


@cli.command(example="qsnap convert lab before-update")
@saved_vne
@saved_name
@click.pass_obj
def convert(settings: Settings, vne: str, name: str) -> Answer:
    """Make a snapshot of the engine record instant to restore.

    Each VM's stream becomes flat RAM and a device state, which take its place. No QEMU runs.
    """
    flat = call_with_bars(settings, qsnap.convert, vne, name)
    hint = ("Go back to it", settings.command_line("restore", vne, name))
    return Answer(flat, tables.with_next(tables.converted_text(flat), hint))


@cli.command(example="qsnap rm lab before-update after-update")
@saved_vne
@click.argument("names", nargs=-1, required=True, metavar="NAME...", shell_complete=complete_snapshots)
@click.pass_obj
def rm(settings: Settings, vne: str, names: tuple[str, ...]) -> Answer:
    """Remove snapshots, and the files that nothing else needs."""
    for name in names:  # an unknown name is refused before anything is removed
        _refuse_unknown(settings, vne, name)
    removed = {}
    try:
        for name in dict.fromkeys(names):
            removed[name] = call(settings, qsnap.remove, vne, name)
    except qsnap.QsnapError as error:
        gone = [*removed, *([name] if isinstance(error, qsnap.IntegrityError) else [])]  # where it is another's damage
        error.add_note(f"Removed: {', '.join(gone) or 'none'}.")
        raise
    return Answer(removed, tables.removed_text(vne, removed))


def _refuse_unknown(settings: Settings, vne: str, name: str) -> None:
    """A damaged snapshot is a known one, and so is one of which a host has lost or removed its part."""
    with suppress(qsnap.IntegrityError):
        try:
            call(settings, qsnap.show, vne, name)
        except qsnap.StateError:
            if name not in [each.name for each in call(settings, qsnap.snapshots, vne)]:
                raise


@cli.command(example="qsnap down lab")
@running_vne
@click.pass_obj
def down(settings: Settings, vne: str) -> Answer:
    """End a VNE. What it did since its last snapshot is lost."""
    call(settings, qsnap.down, vne)
    return Answer(None, f"{vne} is down.")


@cli.command(example="qsnap recover lab")
@click.argument("vne", required=False, shell_complete=complete_running)
@click.pass_obj
def recover(settings: Settings, vne: str | None) -> Answer:
    """Finish or undo what a qsnap that was killed had begun.

    Every command on a VNE does so first; this one does nothing else.
    """
    done = call(settings, qsnap.recover, vne)
    return Answer(done, f"Put right: {', '.join(done)}." if done else "Nothing had to be put right.")


@cli.command(example="qsnap host")
@click.option("--qemu", default="qemu-system-x86_64", show_default=True, metavar="PATH", help="The QEMU to ask.")
@click.pass_obj
def host(settings: Settings, qemu: str) -> Answer:
    """Try out what this host and you can do, and say how to come by the rest.

    QEMU and networks are needed. The others make things faster.
    """
    found = run_until_signal(partial(qsnap.abilities, qemu=qemu, place=settings.place))
    return Answer(found, tables.abilities_text(found))


@cli.command(example="qsnap console lab alice")
@running_vne
@click.argument("vm", shell_complete=complete_vms)
@click.pass_obj
def console(settings: Settings, vne: str, vm: str) -> None:
    """Use the serial console of a VM, on whatever host it runs. Ctrl-] leaves.

    Where the input is no terminal, it is copied to the console as it is; once it has ended, and the console has
    said nothing for a second, the command ends. What was said before is in the file console.log of the run
    directory of its host.
    """
    end = call(settings, _use_console, vne, vm)
    if sys.stdin.isatty():
        what = f"{vm} has ended" if end is terminal.End.CLOSED else f"Left the console of {vm}"
        click.echo(f"\n{what}.", err=True)


async def _use_console(vne: str, vm: str, *, place: qsnap.Place) -> terminal.End:
    async with qsnap.open_console(vne, vm, place=place) as console:
        if sys.stdin.isatty():
            click.echo(f"Console of {vm} in {vne}. Ctrl-] leaves.", err=True)
        return await terminal.use(console)


cli.add_command(agent)
cli.add_command(hosts)
cli.add_command(pki)


@cli.command(example='eval "$(qsnap completion bash)"')
@click.argument("shell", type=click.Choice(list(SHELLS)))
def completion(shell: str) -> Answer:
    """Print the completion script of a shell.

    It completes commands and options, and the names of VNEs, VMs and snapshots.

    \b
    bash: put into ~/.bashrc            eval "$(qsnap completion bash)"
    zsh:  put into ~/.zshrc             eval "$(qsnap completion zsh)"
    fish: run once                      qsnap completion fish > ~/.config/fish/completions/qsnap.fish
    """
    script = SHELLS[shell](cli, {}, "qsnap", "_QSNAP_COMPLETE").source()
    return Answer(script, script)
