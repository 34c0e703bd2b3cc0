"""Each benchmark runs to its end, in its smallest form: figures are not judged here."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from functools import partial

import pytest
import trio

from bench.guest import VNE, running_guests, temporary_place
from bench.results.capture import open_capture
from bench.vne import GUEST, count_timeouts
from qsnap.host.clock import steady_s
from qsnap.host.netns import make_netns, remove_netns, run_in_netns
from qsnap.rules.colouring import tap_name
from tests.live.lab import ROOT
from tests.test_results import make_frame


@pytest.mark.parametrize("name", ["cost", "downtime", "fleet", "receiver", "restore", "scale", "vne"])
def test_a_benchmark_reports(name: str) -> None:
    command = [sys.executable, "-m", f"bench.{name}", "--quick", "--runs", "1", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stdout, done.stderr
    report = json.loads(done.stdout)
    assert set(report) == {"machine", "rows", "bars"}
    assert report["rows"]
    assert all(row.keys() == report["rows"][0].keys() for row in report["rows"])
    assert all(set(bar) == {"name", "value", "limit", "holds"} for bar in report["bars"])
    assert done.returncode == (0 if all(bar["holds"] for bar in report["bars"]) else 1)


async def test_a_cut_cable_makes_tcp_time_out() -> None:
    """The count by which benchmarks say that there was none: of the guests' kernels, read from outside."""
    with temporary_place() as place:
        async with running_guests(place, vms=2, memory_mib=96, **GUEST) as guests:
            netns = place.runtime().load(VNE).netns
            before = count_timeouts(guests)
            for state in ("down", "up"):
                await trio.run_process(["ip", "-n", netns, "link", "set", tap_name(0, 0), state])
                await trio.sleep(2)
            assert count_timeouts(guests) > before


async def test_segments_that_come_out_of_an_interface_are_seen() -> None:
    """And not those that go into it. Each with its time."""
    async with make_netns(f"qsnap-test-{os.getpid()}") as netns:
        try:
            for words in ("add name tap type veth peer name guest", "set tap up", "set guest up"):
                await trio.run_process(["ip", "-n", netns, "link", *words.split()])
            with trio.fail_after(10):
                async with open_capture(netns, "tap") as capture, trio.open_nursery() as nursery:
                    nursery.start_soon(capture.wait_new_bytes, 150)
                    await run_in_netns(netns, partial(send, "tap", make_frame(5000, 900)))
                    begun_s = steady_s()
                    await run_in_netns(netns, partial(send, "guest", make_frame(0, 100), make_frame(100, 50)))
        finally:
            await remove_netns(netns)
    assert [sent.end_bytes for sent in capture.flows.sent] == [100, 150]
    assert all(begun_s - 0.01 < sent.instant_s < steady_s() for sent in capture.flows.sent)


def send(interface: str, *frames: bytes) -> None:
    """Into an interface of the namespace that this thread is in."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0) as packets:
        packets.bind((interface, 0))
        for frame in frames:
            packets.send(frame)
