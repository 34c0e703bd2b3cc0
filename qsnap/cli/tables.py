"""What people see of the library's values. Plain columns: nothing that a pipe or 80 columns would spoil."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from qsnap import Ability, AttachReport, HostReport, Report, RestoreReport, Snapshot, VMStatus, VNEStatus
from qsnap.model import DiskImage, StoredFile, VMSnapshot, version_text
from qsnap.rules.figures import discrepancy_ms, longest_downtime_ms, reasons, stored_bytes
from qsnap.rules.manifest import files_in
from qsnap.units import count_text, duration_text, instant_text, percent_text, size_text

NOTHING = "-"
WAS_PAUSED = "was paused"
DIGEST_DIGITS = 12  #: of a SHA-256, enough to compare by eye
_NUMERIC = frozenset({"PID", "MEMORY", "DOWNTIME", "TOTAL", "ITER.", "LAST PAGES", "IMAGE", "VMS", "SIZE"})
_STATE_STYLES = {"running": "green", "paused": "yellow"}
Cell = str | Text


def statuses_text(vnes: Sequence[VNEStatus]) -> RenderableType:
    """The VMs of all these VNEs."""
    if not vnes:
        return "No VNE is up."
    where = "HOST" if any(vm.host for vne in vnes for vm in vne.vms) else "NETNS"
    header = ("VNE", "VM", "STATE", "PID", "ACCEL", "QEMU", "MEMORY", where)
    table = _table(header, [row for vne in vnes for row in _status_rows(vne)])
    notes = [note for vne in vnes for note in vne.notes]
    return Group(table, "", *notes) if notes else table


def attached_text(report: AttachReport) -> RenderableType:
    """What qsnap is attached to, and what of it a snapshot will not hold together."""
    notes = [f"{vm}: {', '.join(names)} is outside of the VNE." for vm, names in report.outside.items()]
    if report.barrier_only:
        notes.append(f"Only with --cut barrier: {report.barrier_only}.")
    return Group(statuses_text([report.status]), *(["", *notes] if notes else []))


def _status_rows(vne: VNEStatus) -> list[tuple[Cell, ...]]:
    if not vne.vms:  # another qsnap is starting them, or was killed while it did; or none of its hosts can be asked
        state = "not known" if vne.notes else "no VM yet"
        return [(vne.name, NOTHING, state, NOTHING, NOTHING, NOTHING, NOTHING, vne.netns)]
    return [_status_row(vne, vm) for vm in vne.vms]


def _status_row(vne: VNEStatus, vm: VMStatus) -> tuple[Cell, ...]:
    return (
        vne.name,
        vm.name,
        Text(vm.state, style=_STATE_STYLES.get(vm.state, "red")),
        str(vm.pid or NOTHING),
        vm.accelerator.value,
        version_text(vm.qemu_version) if any(vm.qemu_version) else NOTHING,
        size_text(vm.memory_bytes),
        vm.host or vne.netns or NOTHING,
    )


def saved_text(snapshot: Snapshot) -> RenderableType:
    """A snapshot that was just taken."""
    return Group(f"Saved {snapshot.vne.name}/{snapshot.name}.", "", captures_text(snapshot))


def captures_text(snapshot: Snapshot) -> RenderableType:
    """What a snapshot cost each VM, how far apart they were stopped, and why their engines were chosen."""
    header = ("VM", "ENGINE", "DOWNTIME", "TOTAL", "ITER.", "LAST PAGES", "IMAGE")
    table = _table(header, [_capture_row(vm) for vm in snapshot.vms])
    return Group(table, "", *_discrepancy(snapshot), *reasons(snapshot))


def _capture_row(vm: VMSnapshot) -> tuple[str, ...]:
    cost = vm.measurements
    return (
        vm.vm.name,
        vm.engine.value,
        duration_text(cost.downtime_ms) if vm.was_running else WAS_PAUSED,
        duration_text(cost.total_ms),
        f"{cost.iterations}",
        f"{cost.last_iteration_pages:,}",
        _image(vm),
    )


def _image(vm: VMSnapshot) -> str:
    return f"{size_text(vm.measurements.image_bytes)} = {percent_text(vm.measurements.image_to_memory)}"


def _discrepancy(snapshot: Snapshot) -> list[str]:
    apart_ms = discrepancy_ms(snapshot)
    if apart_ms is None:
        return []
    return [f"Discrepancy: the VMs were stopped within {duration_text(apart_ms)} of each other."]


def snapshots_text(snapshots: Sequence[Snapshot]) -> RenderableType:
    """One line for each snapshot. What is a part of one, as a host has it, names the host."""
    if not snapshots:
        return "No snapshots."
    header = ("VNE", "NAME", "CREATED", "VMS", "SIZE", "DOWNTIME", "CUT")
    return _table(header, [_snapshot_row(snapshot) for snapshot in snapshots])


def _snapshot_row(snapshot: Snapshot) -> tuple[str, ...]:
    downtime_ms = longest_downtime_ms(snapshot)
    return (
        snapshot.vne.name,
        snapshot.name,
        instant_text(snapshot.created_s),
        f"{len(snapshot.vms)} on {snapshot.vne.here}" if snapshot.vne.here else str(len(snapshot.vms)),
        size_text(stored_bytes(snapshot)),
        WAS_PAUSED if downtime_ms is None else duration_text(downtime_ms),
        snapshot.cut.value,
    )


def details_text(snapshot: Snapshot) -> RenderableType:
    """All that is known of a snapshot."""
    facts = {
        "snapshot": snapshot.name,
        "VNE": snapshot.vne.name,
        **({"part": f"of host {snapshot.vne.here}; other hosts have the rest"} if snapshot.vne.here else {}),
        "created": instant_text(snapshot.created_s),
        "cut": snapshot.cut.value,
        "size": size_text(stored_bytes(snapshot)),
        "networks": ", ".join(f"{network.name} (MTU {network.mtu})" for network in snapshot.vne.networks) or "none",
    }
    return Group(_facts(facts), "", captures_text(snapshot), *(_vm_details(vm) for vm in snapshot.vms))


def _vm_details(vm: VMSnapshot) -> RenderableType:
    nics = [f"{nic.network} {nic.mac} {nic.model}" for nic in vm.vm.nics]
    facts = {
        **({"host": vm.vm.host} if vm.vm.host else {}),
        **({"kept on": vm.kept_on} if vm.kept_on else {}),
        "memory": size_text(vm.vm.ram_bytes),
        "processors": f"{vm.vm.vcpus}, {vm.accelerator.value}",
        "machine": f"{vm.machine_type}, QEMU {version_text(vm.qemu_version)}",
        "NICs": "\n".join(nics) or "none",
        **{f"RAM {block.idstr}": _file(block.file) for block in vm.ram},
        "stream" if vm.recorded else "devices": _file(vm.device_stream),
        **{f"disk {index}": _disk(disk) for index, disk in enumerate(vm.disks)},
        "hardware": shlex.join(vm.hardware),
    }
    return Group("", Text(f"VM {vm.vm.name}", style="bold"), _facts(facts))


def _disk(disk: DiskImage) -> str:
    base = disk.base
    lies_on = [f"on {base.file} ({base.format}, {size_text(base.size_bytes)})"] if base else []
    return "\n".join([f"{disk.engine.value}: {disk.reason}", *map(_file, disk.layers), *lies_on])


def _file(file: StoredFile) -> str:
    return f"{file.path} {size_text(file.size_bytes)} sha256 {file.sha256[:DIGEST_DIGITS]}"


def restored_text(report: RestoreReport, *, paused: bool) -> RenderableType:
    """How long a restore took, and how each VM got its RAM."""
    what = "is loaded and paused" if paused else "runs"
    vne, name = report.snapshot.vne.name, report.snapshot.name
    line = f"{vne} {what} as it was in {name}, after {duration_text(report.ready_ms)}."
    return Group(line, "", _table(("VM", "RAM"), list(report.ram.items())))


def verified_text(snapshot: Snapshot) -> str:
    """That a snapshot is what was stored."""
    files = files_in(snapshot)
    amount = f"{count_text(len(files), 'file')}, {size_text(sum(file.size_bytes for file in files))}"
    return f"{snapshot.vne.name}/{snapshot.name} is intact: {amount}."


def report_text(report: Report) -> str:
    """Where a report was written to."""
    files = " and ".join(filter(None, (report.page, report.png)))
    return f"{count_text(len(report.snapshots), 'snapshot')} of {report.snapshots[0].vne.name}, drawn in {files}."


def converted_text(snapshot: Snapshot) -> RenderableType:
    """What a snapshot takes now that it is flat."""
    rows = [(vm.vm.name, _image(vm)) for vm in snapshot.vms]
    return Group(f"{snapshot.vne.name}/{snapshot.name} is flat.", "", _table(("VM", "IMAGE"), rows))


def removed_text(vne: str, removed: Mapping[str, Sequence[str]]) -> str:
    """What is gone."""
    lines = (f"Removed {vne}/{name} ({count_text(len(files), 'file')})." for name, files in removed.items())
    return "\n".join(lines)


def with_next(text: RenderableType, *hints: tuple[str, str]) -> RenderableType:
    """An answer, and below it what to type next: (what it does, the command)."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", style="cyan")
    for purpose, command in hints:
        table.add_row(f"{purpose}:", command)
    return Group(text, "", table)


def abilities_text(abilities: Sequence[Ability]) -> RenderableType:
    """What is here and what is not, each with what to do about it."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for ability in abilities:
        mark = Text("yes", style="green") if ability.here else Text("no", style="yellow")
        table.add_row(ability.name, mark, "\n".join(filter(None, (ability.finding, ability.remedy))))
    return table


def hosts_text(hosts: Sequence[HostReport]) -> RenderableType:
    """What each host can do, or why its agent cannot be asked, with what to do about it."""
    lines: list[RenderableType] = []
    for each in hosts:
        state = Text("not reachable", style="red") if each.fault else Text(f"qsnap {each.version}", style="green")
        lines += ["", Text.assemble((each.host.name, "bold"), f" {each.host.address}:{each.host.port} ", state)]
        lines.append(abilities_text(each.abilities) if not each.fault else "\n".join([each.fault, each.remedy]))
    return Group(*lines[1:])


def _table(header: Sequence[str], rows: Iterable[Sequence[Cell]]) -> Table:
    """Columns without lines. Where the terminal is too narrow, names are folded and numbers are not."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for title in header:
        numeric = title in _NUMERIC
        table.add_column(title, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def _facts(facts: Mapping[str, str]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value)
    return table
