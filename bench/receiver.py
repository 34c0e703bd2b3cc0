"""What it costs to make a snapshot of a migration stream, next to a reader that keeps nothing of it.

Live: guests of 512 MiB and 1 GiB, dirtying 100 MB/s and otherwise idle, are captured by each engine and, in turn, by
the same migration into the null reader; the total is from `migrate` to the last byte. Generated: streams of those sizes
through a pipe, one with nothing but zero pages, one with nothing but data; these show what the two kinds cost by
themselves, where the source costs next to nothing.

The receiver's private memory is RssAnon of its process, looked at every few ms; numpy and Python are in it.
Medians of at least 5 runs, the peak is the highest of all runs. The store is on tmpfs.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path

import numpy as np
import trio
from attrs import define

from bench.guest import VNE, Guest, memory_directory, running_guests, temporary_place
from bench.report import Bar, Options, Report, Row, median, run
from bench.ways import PIPE_BYTES, Way, by_qsnap, migrate_into_null, read_all
from qsnap.host.daemon import open_daemon
from qsnap.host.migration import BACKGROUND_CAPABILITIES
from qsnap.host.qemu import find_processes
from qsnap.model import Backing, Engine
from qsnap.rules.command import RAM_ID
from qsnap.wire import encode
from qsnap.wire.records import RAMBlock, RamSetup

MEMORY_MIB = (512, 1024)
RATE_MB = 100
TOTAL_LIMIT = {Engine.PRECOPY: 1.25, Engine.BACKGROUND: 1.15}  #: over the null reader's
NULL_CAPABILITIES: dict[Engine, frozenset[str]] = {
    Engine.PRECOPY: frozenset(),
    Engine.BACKGROUND: BACKGROUND_CAPABILITIES,
}
PRIVATE_LIMIT = 0.05  #: of the guest's RAM
SAMPLE_S = 0.005
PAGE_BYTES = 4096
CHUNK_PAGES = 1024


# ---- the receiver's memory ----


@define
class Peak:
    """The most private memory that any of the processes looked at has had."""

    private_bytes: int = 0

    @asynccontextmanager
    async def watched(self, mark: str) -> AsyncIterator[None]:
        """Look at the receiver whose command line has `mark` while the block runs."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, mark)
            yield
            nursery.cancel_scope.cancel()

    async def _watch(self, mark: str) -> None:
        while not (found := find_processes([mark])):
            await trio.sleep(SAMPLE_S)
        with suppress(OSError):  # it has ended
            while True:
                status = Path(f"/proc/{found[0].pid}/status").read_text()
                resident = re.search(r"RssAnon:\s*(\d+)", status)
                self.private_bytes = max(self.private_bytes, int(resident[1]) << 10 if resident else 0)
                await trio.sleep(SAMPLE_S)


# ---- live ----


async def measure_live(guest: Guest, engine: Engine, runs: int) -> tuple[Row, list[Bar]]:
    """Captures by this engine, in turn with the same migration into the null reader."""
    null = Way("null reader", partial(migrate_into_null, capabilities=NULL_CAPABILITIES[engine]))
    ours = by_qsnap(engine)
    totals: dict[str, list[float]] = {ours.name: [], null.name: []}
    peak = Peak()
    await null.save(guest)  # whoever comes first has to populate things
    for _ in range(runs):
        async with peak.watched(f"{guest.place.store}/{VNE}/snapshots"):
            totals[ours.name].append((await ours.save(guest)).total_ms)
        await ours.tidy(guest)
        totals[null.name].append((await null.save(guest)).total_ms)
    case = f"{engine.value}, {guest.memory_mib} MiB"
    row = make_row(guest.memory_mib, f"live, {engine.value}", totals[ours.name], totals[null.name], peak)
    return row, [Bar(f"total over null reader, {case}", row["ratio"], TOTAL_LIMIT[engine]), memory_bar(case, row)]


# ---- generated ----


def zero_chunk(block: RAMBlock, first_page: int) -> bytes:
    """Records of neighbouring zero pages."""
    return encode.encode_zero_pages(block, _offsets(first_page))


def data_chunk(block: RAMBlock, first_page: int) -> bytes:
    """Records of neighbouring pages of noise."""
    noise = np.random.default_rng(first_page).integers(0, 256, (CHUNK_PAGES, PAGE_BYTES), np.uint8)
    return encode.encode_pages(block, _offsets(first_page), noise)


def _offsets(first_page: int) -> np.typing.NDArray[np.uint64]:
    return np.arange(first_page, first_page + CHUNK_PAGES, dtype=np.uint64) * np.uint64(PAGE_BYTES)


def generate(memory_mib: int, chunk: Callable[[RAMBlock, int], bytes]) -> Iterator[bytes]:
    """A whole stream with every page of one RAMBlock once, and an empty device state."""
    block = RAMBlock(RAM_ID, memory_mib << 20)
    ram = RamSetup(2, 0, 4, (block,))
    machine = b"pc-i440fx-9.9"
    yield (0x5145564D).to_bytes(4) + (3).to_bytes(4) + b"\7" + len(machine).to_bytes(4) + machine
    yield encode.encode_ram_setup(ram) + encode.encode_ram_end(ram)
    for first_page in range(0, block.used_length // PAGE_BYTES, CHUNK_PAGES):
        yield chunk(block, first_page)
    description = json.dumps({"page_size": PAGE_BYTES, "devices": []}).encode()
    yield encode.encode_section_end(ram) + b"\0\6" + len(description).to_bytes(4) + description


async def measure_generated(
    memory_mib: int, kind: str, chunk: Callable[[RAMBlock, int], bytes], runs: int
) -> tuple[Row, list[Bar]]:
    """The same stream into the receiver and into the null reader, in turn."""
    pieces = list(generate(memory_mib, chunk))
    totals: tuple[list[float], list[float]] = ([], [])
    peak = Peak()
    for _ in range(runs):
        for taken, read in zip(totals, (receive, discard), strict=True):
            taken.append(await read(pieces, memory_mib, peak))
    row = make_row(memory_mib, f"generated, {kind} pages", *totals, peak)
    return row, [memory_bar(f"{kind} pages, {memory_mib} MiB", row)]


async def receive(pieces: list[bytes], memory_mib: int, peak: Peak) -> float:
    """Milliseconds from the first byte to the receiver's last word."""
    with memory_directory() as directory:
        async with trio.open_nursery() as nursery, peak.watched(str(directory)):
            opened = open_daemon(
                nursery,
                directory,
                vm="generated",
                backed=(RAM_ID,),
                ram_limit_bytes=memory_mib << 20,
                keeps_reading=False,
                heir=(),
                on_bytes=lambda count: None,
            )
            async with opened as (daemon, outlet):
                await daemon.wait_ready()
                return await timed(pieces, outlet, daemon.wait_done)


async def discard(pieces: list[bytes], memory_mib: int, peak: Peak) -> float:
    """The same, with the null reader."""
    inlet, outlet = os.pipe()
    fcntl.fcntl(inlet, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    return await timed(pieces, outlet, partial(trio.to_thread.run_sync, read_all, inlet))


async def timed(pieces: list[bytes], outlet: int, read: Callable[[], Awaitable[object]]) -> float:
    started_s = time.perf_counter()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, pour, pieces, outlet)
        await read()
    return (time.perf_counter() - started_s) * 1e3


def pour(pieces: list[bytes], outlet: int) -> None:
    """Write all pieces and close the pipe."""
    with open(outlet, "wb", buffering=0) as stream:
        for piece in pieces:
            rest = memoryview(piece)
            while rest:
                rest = rest[stream.write(rest) :]


# ---- the report ----


def make_row(memory_mib: int, stream: str, ours: list[float], null: list[float], peak: Peak) -> Row:
    return {
        "memory_mib": memory_mib,
        "stream": stream,
        "total_ms": median(ours),
        "null_reader_ms": median(null),
        "ratio": round(median(ours) / median(null), 3),
        "private_peak_mib": round(peak.private_bytes / (1 << 20), 1),
        "private_share": round(peak.private_bytes / (memory_mib << 20), 4),
    }


def memory_bar(case: str, row: Row) -> Bar:
    return Bar(f"private memory over the guest's, {case}", row["private_share"], PRIVATE_LIMIT)


async def benchmark(options: Options) -> Report:
    results = []
    sizes = MEMORY_MIB[:1] if options.quick else MEMORY_MIB
    for memory_mib in sizes:
        with temporary_place() as place:
            settings = {"memory_mib": memory_mib, "rate_mb": RATE_MB, "backing": Backing.HUGETLB}
            async with running_guests(place, **settings) as (guest,):
                results += [await measure_live(guest, engine, options.runs) for engine in TOTAL_LIMIT]
        for kind, chunk in (("zero", zero_chunk), ("data", data_chunk)):
            results.append(await measure_generated(memory_mib, kind, chunk, options.runs))
    return Report([row for row, _ in results], [bar for _, bars in results for bar in bars])


if __name__ == "__main__":
    sys.exit(run(benchmark))
