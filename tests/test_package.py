"""What `pip install .` gives: the command, a typed package, and nothing that belongs to its tests."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> ZipFile:
    """The wheel of this checkout, built from a copy so that the checkout stays as it is."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True)
    names = listed.stdout.decode().split("\0") if listed.returncode == 0 else map(str, _files_of_an_archive())
    for name in filter(None, names):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "-q",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(target),
        str(source),
    ]
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL)
    return ZipFile(next(target.glob("*.whl")))


def _files_of_an_archive() -> list[Path]:
    """Without git: the files that the package is made of."""
    wanted = (*ROOT.glob("qsnap/**/*"), ROOT / "pyproject.toml", ROOT / "README.md", ROOT / "LICENSE")
    return [path.relative_to(ROOT) for path in wanted]


def test_the_wheel_holds_the_typed_package_only(wheel: ZipFile) -> None:
    names = wheel.namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops - {"qsnap"} == {top for top in tops if top.endswith(".dist-info")}
    assert {"qsnap/py.typed", "qsnap/drawing/page.html"} <= set(names)
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("qsnap/**/*.py")}
    assert sources <= set(names)


def test_the_wheel_has_the_command(wheel: ZipFile) -> None:
    entry_points = ConfigParser()
    entry_points.read_string(_metadata(wheel, "entry_points.txt"))
    assert dict(entry_points["console_scripts"]) == {"qsnap": "qsnap.cli:main"}


def test_the_wheel_has_readme_and_licence(wheel: ZipFile) -> None:
    metadata = Parser().parsestr(_metadata(wheel, "METADATA"))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_the_oldest_dependencies_tested_are_the_declared_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    declared = [*project["dependencies"], *(each for extra in extras for each in extra)]
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    tested = dict(re.findall(r"^([\w.-]+)==([\d.]+)", "\n".join(lines), re.MULTILINE))
    bounds = dict(dependency.split(">=") for dependency in declared)
    assert tested.keys() == bounds.keys()
    for name, bound in bounds.items():
        assert f"{tested[name]}.".startswith(f"{bound}."), name


def _metadata(wheel: ZipFile, file: str) -> str:
    name = next(name for name in wheel.namelist() if name.endswith(f".dist-info/{file}"))
    return wheel.read(name).decode()
