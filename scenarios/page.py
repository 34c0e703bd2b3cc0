"""The page of a result: HTML in one file that refers to nothing outside it."""

from __future__ import annotations

import time
from pathlib import Path

from jinja2 import Environment, FileSystemLoader
from markupsafe import Markup

from scenarios.chart import draw_progress
from scenarios.running import Result

_templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True)


def make_page(result: Result) -> str:
    """The page."""
    options = result.options
    facts = {
        "VMs": len(result.vne.vms),
        "Networks": len(result.vne.networks),
        "Memory": f"{sum(vm.memory_bytes for vm in result.vne.vms) >> 20} MiB",
        "Hosts": "two, in namespaces" if options.hosts else "one",
        "Snapshots": sum(len(run.saved) for run in result.runs),
        "Took": f"{result.took_s:.0f} s",
    }
    return _templates.get_template("page.html").render(
        result=result,
        facts=facts,
        when=time.strftime("%Y-%m-%d %H:%M", time.localtime(result.started_s)),
        chart=Markup(draw_progress(result.runs)) if result.runs else "",
        saved=[each for run in result.runs for each in run.saved],
    )


def write_page(result: Result, path: Path) -> None:
    """The same into a file, whose directory is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(make_page(result))
