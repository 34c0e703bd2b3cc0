"""What the benchmarks share: the report with its exit status, and how lost work is computed."""

from __future__ import annotations

import json
import signal

import pytest
import trio

from bench.guest import Meter
from bench.probe import Probe, Sample
from bench.report import Bar, Options, Report, run


async def good(options: Options) -> Report:
    return Report([{"what": "a", "figure": options.runs}], [Bar("kept", 1.0, 1.0)])


async def bad(options: Options) -> Report:
    return Report([{"what": "a", "figure": 1}], [Bar("kept", 1.0, 1.0), Bar("missed", 1.1, 1.0)])


def test_a_bar_that_does_not_hold_is_the_exit_status(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(good, []) == 0
    assert "holds: kept" in capsys.readouterr().out
    assert run(bad, []) == 1
    assert "BROKEN: missed: 1.1 (limit 1.0)" in capsys.readouterr().out


def test_the_report_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(bad, ["--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["machine"]["cores"] >= 1
    assert report["rows"] == [{"what": "a", "figure": 1}]
    assert report["bars"] == [
        {"name": "kept", "value": 1.0, "limit": 1.0, "holds": True},
        {"name": "missed", "value": 1.1, "limit": 1.0, "holds": False},
    ]


def test_five_runs_unless_told_otherwise(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, runs in ([], 5), (["--runs", "7"], 7):
        run(good, ["--json", *arguments])
        assert json.loads(capsys.readouterr().out)["rows"][0]["figure"] == runs


class Scripted(Probe):
    """A guest whose progress at each look is known beforehand."""

    def __init__(self, *samples: tuple[float, int]) -> None:
        self.samples = [Sample(*sample) for sample in samples]

    def sample(self) -> Sample:
        return self.samples.pop(0)


async def nothing() -> str:
    return "done"


async def test_lost_work_is_what_is_missing_at_the_rate_around_the_action() -> None:
    before, during, after = [(0.0, 0), (1.0, 900)], [(2.0, 2000), (4.0, 3500)], [(5.0, 5000), (6.0, 6100)]
    meter = Meter(Scripted(*before, *during, *after), window_s=0.0)
    result, lost_ms = await meter.lost_ms(nothing, nothing)
    assert result == "done"
    assert lost_ms == pytest.approx(500)  # 1500 done in 2 s, at 1000 per s


async def test_the_window_after_one_action_is_the_one_before_the_next() -> None:
    shared = [(2.0, 2000), (3.0, 3000)]
    meter = Meter(
        Scripted(
            (0.0, 0), (1.0, 1000), (1.0, 1000), (2.0, 2000), *shared, (3.0, 0), (4.0, 1500), (4.0, 0), (5.0, 2000)
        ),
        0.0,
    )
    assert (await meter.lost_ms(nothing, nothing))[1] == pytest.approx(0)
    assert (await meter.lost_ms(nothing, nothing))[1] == pytest.approx(0)


def test_one_that_is_ended_tidies_up() -> None:
    undone = []

    async def endless(options: Options) -> Report:
        try:
            signal.raise_signal(signal.SIGTERM)
            with trio.fail_after(30):
                await trio.sleep_forever()
        finally:
            undone.append(options.runs)
        raise AssertionError

    assert run(endless, ["--runs", "3"]) == 130
    assert undone == [3]
