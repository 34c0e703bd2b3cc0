"""Reports of what real snapshots measured."""

from __future__ import annotations

from pathlib import Path

import pytest

import qsnap
from qsnap.drawing.timeline import plan_timeline


@pytest.mark.parametrize("vne", ["seven", "eleven"])
async def test_a_real_snapshot_is_drawn(vne: str, golden: qsnap.Place, tmp_path: Path) -> None:
    page, png = tmp_path / "page.html", tmp_path / "page.png"
    report = await qsnap.report(vne, ["booted"], page=page, png=png, place=golden)
    (saved,) = report.snapshots
    timeline = plan_timeline(saved)
    for lane, vm in zip(timeline.lanes, saved.vms, strict=True):
        assert lane.capture is not None
        assert lane.pause is not None
        assert lane.capture.start_ms < lane.pause.end_ms < lane.capture.end_ms
        assert lane.pause.length_ms == pytest.approx(vm.measurements.downtime_ms, abs=0.01)
        assert f">{lane.vm}<" in page.read_text()
    assert timeline.discrepancy is not None
    assert timeline.discrepancy.length_ms == pytest.approx(saved.discrepancy_ms, abs=0.01)
    assert png.stat().st_size > 10_000
