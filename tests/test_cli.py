"""The command line, without QEMU: a real store, state files of VNEs whose processes are gone, and a fake console."""

from __future__ import annotations

import configparser
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path

import pytest
import trio
from attrs import evolve
from cattrs.preconf.json import make_converter
from click.shell_completion import BashComplete
from rich.console import Console, RenderableType
from rich.progress import Progress as Display

import qsnap
from qsnap.cli import main, tables
from qsnap.cli.bars import Lines
from qsnap.cli.commands import cli
from qsnap.cli.group import exit_codes
from qsnap.cli.pki import pki
from qsnap.fleet.identity import load_identity, peer_of
from qsnap.fleet.spread import remember
from qsnap.host.qemu import Process
from qsnap.host.runtime import LiveVM, LiveVNE
from qsnap.host.store import Store
from qsnap.model import Accelerator, Colour, version_text
from qsnap.units import count_text, duration_text, percent_text, size_text
from tests.samples import contents, snapshot

Run = Callable[..., tuple[int, str, str]]
COMMANDS = sorted(cli.commands)
GONE = Process(pid=1, start_ticks=-1)  #: never alive: process 1 did not start then


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> qsnap.Place:
    """A place named by the environment, with the snapshots s1 and s2 of `lab`."""
    place = qsnap.Place(tmp_path / "run", tmp_path / "store")
    monkeypatch.setenv("QSNAP_RUN", str(place.run))
    monkeypatch.setenv("QSNAP_STORE", str(place.store))
    for name in ("s1", "s2"):
        trio.run(_save, Store(place.store), name)
    return place


async def _save(store: Store, name: str) -> None:
    await store.begin("lab", name)
    for path, content in contents(name).items():
        file = store.root / "lab" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    await store.commit(snapshot(name))


@pytest.fixture
def dead_lab(place: qsnap.Place) -> LiveVNE:
    """The VNE `lab`, up according to its state file, its only VM dead."""
    vm = snapshot().vms[0]
    live = LiveVM(vm.vm, GONE, vm.hardware, vm.machine_type, vm.accelerator, vm.qemu_version, False, ())
    lab = LiveVNE(snapshot().vne, str(place.store), "qsnap-lab", Colour.RED, (live,))
    place.runtime().save(lab)
    return lab


@pytest.fixture
def run(place: qsnap.Place, capfd: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs qsnap in this process: (exit code, stdout, stderr)."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}

    def call(*words: str) -> tuple[int, str, str]:
        code = main(words)
        out, err = capfd.readouterr()
        return code, out, err

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


def as_json(value: object) -> object:
    return json.loads(make_converter().dumps(value))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(run: Run, command: str) -> None:
    code, out, err = run(command, "--help")
    assert (code, err) == (0, "")
    assert f"qsnap {command}" in out.partition("Example:")[2]
    assert all(len(line) <= 100 for line in out.splitlines())


def test_help_lists_every_exit_code(run: Run) -> None:
    code, out, _ = run("-h")
    listed = out.partition("Exit codes:")[2]
    assert code == 0
    assert [number for number, _ in exit_codes()] == [*range(16), 130]
    for number, meaning in exit_codes():
        assert f"  {number:<3}  {meaning.split()[0]}" in listed


def test_version(run: Run) -> None:
    assert run("--version")[1].split()[0] == "qsnap"


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (("up", "/no/lab.toml"), 3, "qsnap: /no/lab.toml: cannot read it: No such file or directory"),
        (("show", "lab", "s3"), 4, "qsnap: lab has no snapshot s3"),
        (("snapshot", "lab"), 4, "qsnap: VNE lab is not up"),
        (("--store", "/no/such/store", "ls"), 6, "qsnap: /no/such/store: there is no store"),
        (("console", "lab", "alice"), 4, "qsnap: VNE lab is not up"),
        (("convert", "lab", "s1"), 4, "qsnap: snapshot s1 of lab is flat already"),
    ],
)
def test_an_error_says_what_where_and_what_next(run: Run, words: tuple[str, ...], code: int, line: str) -> None:
    found, out, err = run(*words)
    assert (found, out) == (code, "")
    first, advice = err.splitlines()
    assert first.startswith(line)
    assert advice.startswith("  ")


@pytest.mark.parametrize("words", [("show", "lab", "s3", "--json"), ("--json", "show", "lab", "s3")])
def test_an_error_as_json(run: Run, words: tuple[str, ...]) -> None:
    code, out, err = run(*words)
    report = json.loads(err)
    assert out == ""
    assert report.keys() == {"error", "message", "where", "advice", "exit_code"}
    assert (report["error"], report["message"]) == ("StateError", "lab has no snapshot s3")
    assert report["exit_code"] == code == 4


def test_a_full_standard_output_is_told_of() -> None:
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "qsnap.cli", "completion", "bash"]
        done = subprocess.run(words, stdout=full, stderr=-1, text=True)
    assert done.returncode == qsnap.HostError.exit_code
    assert done.stderr == (
        "qsnap: standard output: it is done, but the answer cannot be printed: No space left on device\n"
    )


def test_no_standard_output(tmp_path: Path) -> None:
    words = ["ls", "--store", str(tmp_path)]
    command = shlex.join([sys.executable, "-m", "qsnap.cli", *words])
    done = subprocess.run(["sh", "-c", f"exec {command} >&-"], stderr=-1, text=True)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("words", [("nope",), ("show", "lab"), ("ls", "--bad"), ("snapshot", "lab", "--cut", "x")])
def test_a_wrong_command_line(run: Run, words: tuple[str, ...]) -> None:
    code, out, err = run(*words)
    assert (code, out) == (2, "")
    assert "Usage: qsnap" in err
    assert json.loads(run("--json", *words)[2])["exit_code"] == 2


def test_busy(run: Run, place: qsnap.Place, dead_lab: LiveVNE) -> None:
    with place.runtime().locked("lab"):
        assert run("down", "lab")[0] == 5
    assert dead_lab.vne.name in place.runtime().names()


def test_verify(run: Run, place: qsnap.Place) -> None:
    code, out, _ = run("verify", "lab", "s1")
    assert (code, out.startswith("lab/s1 is intact: 3 files, ")) == (0, True)
    ram = place.store / "lab" / snapshot().vms[0].ram[0].file.path
    ram.write_bytes(ram.read_bytes().replace(b"page", b"pale", 1))
    code, _, err = run("verify", "lab", "s1")
    assert code == 10
    assert err.startswith(f"qsnap: {ram}: ")


def test_ls(run: Run) -> None:
    _, out, _ = run("ls")
    header, first, second = out.splitlines()
    assert header.split() == ["VNE", "NAME", "CREATED", "VMS", "SIZE", "DOWNTIME", "CUT"]
    assert first.split()[:2] == ["lab", "s1"]
    assert second.split()[:2] == ["lab", "s2"]
    assert run("ls", "other")[1] == "No snapshots.\n"


def test_json_is_what_the_library_returns(run: Run, place: qsnap.Place) -> None:
    assert json.loads(run("ls", "--json")[1]) == as_json(trio.run(lambda: qsnap.snapshots(place=place)))
    assert json.loads(run("show", "lab", "s1", "--json")[1]) == as_json(snapshot("s1"))
    assert json.loads(run("verify", "lab", "s1", "--json")[1]) == as_json(snapshot("s1"))
    assert json.loads(run("ps", "--json")[1]) == []


def test_show_tells_everything(run: Run) -> None:
    _, out, _ = run("show", "lab", "s1")
    vm = snapshot("s1").vms[0]
    told = (vm.vm.name, vm.reason, vm.machine_type, version_text(vm.qemu_version), vm.vm.nics[0].mac)
    files = (vm.ram[0].file.path, vm.device_stream.path, "/images/base.qcow2", vm.disks[0].layers[0].path)
    for text in (*told, *files, *vm.hardware, f"overlay: {vm.disks[0].reason}"):
        assert text in out


def test_report(run: Run, tmp_path: Path) -> None:
    page, png = tmp_path / "lab.html", tmp_path / "lab.png"
    code, out, err = run("report", "lab", "-o", str(page), "--png", str(png))
    assert (code, out, err) == (0, f"2 snapshots of lab, drawn in {page} and {png}.\n", "")
    assert 'id="s1"' in page.read_text()
    assert png.read_bytes().startswith(b"\x89PNG")
    answer = json.loads(run("report", "lab", "s2", "-o", str(page), "--json")[1])
    assert ([each["name"] for each in answer["snapshots"]], answer["page"], answer["png"]) == (["s2"], str(page), "")
    assert 'id="s1"' not in page.read_text()


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("lab", "s3"), 4, "lab has no snapshot s3"),
        (("other",), 4, "other has no snapshots"),
        (("lab", "-o", "/no/such/page.html"), 6, "/no/such/page.html: No such file or directory"),
    ],
)
def test_a_report_that_cannot_be(run: Run, words: tuple[str, ...], code: int, told: str) -> None:
    found, out, err = run("report", *words)
    assert (found, out) == (code, "")
    assert told in err


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("missing", ["matplotlib", "jinja2"])
def test_a_report_without_its_extra(tmp_path: Path, missing: str) -> None:
    page = tmp_path / "lab.html"
    words = ["report", "lab", "-o", str(page)]
    program = f"import sys; sys.modules[{missing!r}] = None; from qsnap.cli import main; sys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    told = f"qsnap: reports are drawn with {missing}, which is not installed\n  pip install 'qsnap[report]'\n"
    assert (done.returncode, done.stderr) == (6, told)
    assert not page.exists()


def test_rm(run: Run, place: qsnap.Place) -> None:
    assert run("rm", "lab", "s1", "s3")[0] == 4
    assert len(trio.run(Store(place.store).names)) == 2, "nothing is removed when one of the names is wrong"
    code, out, _ = run("rm", "lab", "s1", "s2", "s1", "--json")
    assert (code, list(json.loads(out))) == (0, ["s1", "s2"])
    assert trio.run(Store(place.store).names) == ()


def test_rm_that_fails_tells_what_is_gone(run: Run, place: qsnap.Place) -> None:
    manifest = place.store / "lab/snapshots/s2/manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b" ")
    code, out, err = run("rm", "lab", "s1")
    assert (code, out) == (10, "")
    assert err.endswith("  Removed: s1.\n")
    assert trio.run(Store(place.store).names) == (("lab", "s2"),)


def test_ps(run: Run, dead_lab: LiveVNE, place: qsnap.Place) -> None:
    _, out, _ = run("ps")
    header, row = out.splitlines()
    assert header.split() == ["VNE", "VM", "STATE", "PID", "ACCEL", "QEMU", "MEMORY", "NETNS"]
    assert row.split() == ["lab", "alice", "dead", "1", "tcg", "7.2.22", "4", "MiB", "qsnap-lab"]
    assert json.loads(run("ps", "lab", "--json")[1])["vms"][0]["state"] == "dead"
    assert run("--run-dir", str(place.run / "empty"), "ps")[1] == "No VNE is up.\n"


def test_directories_before_the_command_after_it_and_from_the_environment(run: Run, tmp_path: Path) -> None:
    other = str(tmp_path / "other")
    assert "s1" in run("ls")[1]
    assert "s1" not in run("--store", other, "ls")[1]
    assert "s1" not in run("ls", "--store", other)[1]


def completions(*words: str, incomplete: str = "") -> list[str]:
    shell = BashComplete(cli, {}, "qsnap", "_QSNAP_COMPLETE")
    return [str(item.value) for item in shell.get_completions(list(words), incomplete)]


@pytest.mark.usefixtures("dead_lab")
def test_names_complete(place: qsnap.Place) -> None:
    assert completions("ps") == ["lab"]
    assert completions("ps", incomplete="x") == []
    assert completions("show", "lab") == ["s1", "s2"]
    assert completions("convert", "lab") == ["s1", "s2"]
    assert completions("rm", "lab", "s1") == ["s2"]
    assert completions("console", "lab") == ["alice"]
    assert completions("restore") == ["lab"]
    assert completions("show", "--store", str(place.run), "lab") == []
    assert completions("console", "no such") == []
    assert completions("snapshot", "lab", "--engine") == ["auto", "background", "precopy", "record"]


def test_names_on_other_hosts_complete(place: qsnap.Place) -> None:
    lab = snapshot().vne
    far = qsnap.Host("alpha", "192.0.2.1", 9, "192.0.2.1")
    remember(evolve(lab, name="far", hosts=(far,), vms=(evolve(lab.vms[0], host="alpha"),)), place)
    assert completions("ps") == ["far"]
    assert completions("restore") == ["far", "lab"]
    assert completions("console", "far") == ["alice"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_script(run: Run, shell: str) -> None:
    assert f"_QSNAP_COMPLETE={shell}_complete" in run("completion", shell)[1]


@pytest.mark.parametrize(
    "view", [tables.captures_text, tables.details_text, lambda each: tables.snapshots_text([each])]
)
def test_tables_fit_80_columns_and_lose_nothing(view: Callable[[qsnap.Snapshot], RenderableType]) -> None:
    text = StringIO()
    Console(file=text, width=80, markup=False).print(view(snapshot("a-rather-long-name-of-a-snapshot")))
    assert all(len(line) <= 80 for line in text.getvalue().splitlines())
    assert "\N{HORIZONTAL ELLIPSIS}" not in text.getvalue()


@pytest.mark.parametrize(("here", "said"), [("alpha", True), ("", False)])
@pytest.mark.parametrize("view", [tables.details_text, lambda each: tables.snapshots_text([each])])
def test_a_part_names_its_host(view: Callable[[qsnap.Snapshot], RenderableType], here: str, said: bool) -> None:
    saved, text = snapshot(), StringIO()
    Console(file=text, width=80, markup=False).print(view(evolve(saved, vne=evolve(saved.vne, here=here))))
    assert ("alpha" in text.getvalue()) == said


def test_units() -> None:
    assert [size_text(each) for each in (0, 1023, 1536, 512 << 20, 1 << 40)] == [
        *("0 B", "1023 B", "1.50 KiB", "512 MiB", "1 TiB")
    ]
    assert [duration_text(each) for each in (0.254, 12.34, 812.4, 2500)] == ["0.25 ms", "12.3 ms", "812 ms", "2.50 s"]
    assert [percent_text(each) for each in (0.0, 0.004, 0.58)] == ["0 %", "< 1 %", "58 %"]
    assert [count_text(each, "file") for each in (1, 2000)] == ["1 file", "2,000 files"]


def test_progress_has_one_line_for_each_vm() -> None:
    display = Display(console=Console(file=StringIO()))
    lines = Lines(display)
    for stage, vm, done, total in [("prepare", "a", 0, 0), ("save", "b", 1 << 20, 4 << 20), ("save", "a", 5, 10)]:
        lines.tell(stage, vm, done, total)
    a, b = display.tasks
    assert (a.description, a.fields["stage"], a.completed, a.total) == ("a", "save", 5, 10)
    assert b.fields["amount"] == "1 MiB of 4 MiB"


def qsnap_process(*words: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-W", "error", "-m", "qsnap.cli", *words]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stdout, stderr=subprocess.PIPE)


@pytest.mark.usefixtures("place")
@pytest.mark.parametrize("words", [("show", "lab", "s1"), ("ls", "--json"), ("--help",)])
def test_a_broken_pipe_is_silent(words: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with qsnap_process(*words, stdout=writer) as process:
        os.close(writer)
        assert process.communicate(timeout=30)[1] == b""


@pytest.fixture
def vm_console(place: qsnap.Place, dead_lab: LiveVNE) -> Iterator[socket.socket]:
    """What listens on alice's console."""
    runtime = place.runtime()
    runtime.make_vm_directory("lab", "alice")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(runtime.console_path("lab", "alice"))
        listener.listen()
        listener.settimeout(30)
        yield listener


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted(vm_console: socket.socket, number: signal.Signals) -> None:
    with qsnap_process("console", "lab", "alice") as process:
        connection, _ = vm_console.accept()
        with connection:
            connection.sendall(b"login: ")
            assert process.stdout is not None
            assert process.stdout.read(7) == b"login: "
            process.send_signal(number)
            assert process.communicate(timeout=30)[1].strip() == b"qsnap: interrupted"
    assert process.returncode == 130


def test_a_plain_console_copies_both_ways(vm_console: socket.socket) -> None:
    with qsnap_process("console", "lab", "alice") as process:
        connection, _ = vm_console.accept()
        threading.Thread(target=_echo, args=(connection,)).start()
        typed = os.urandom(1 << 20)
        out, err = process.communicate(typed, timeout=60)
    assert (process.returncode, err) == (0, b"")
    assert out == typed


def _echo(connection: socket.socket) -> None:
    with connection:
        while data := connection.recv(1000):
            connection.sendall(data)


def test_a_console_serves_one_at_a_time(run: Run, vm_console: socket.socket) -> None:
    with socket.socket(socket.AF_UNIX) as first:
        first.connect(vm_console.getsockname())
        connection, _ = vm_console.accept()
        with connection:
            code, _, err = run("console", "lab", "alice")
    assert (code, "somebody else" in err) == (5, True)


def test_accelerators_are_named_by_value(run: Run, dead_lab: LiveVNE) -> None:
    assert dead_lab.vms[0].accelerator is Accelerator.TCG
    assert json.loads(run("ps", "--json")[1])[0]["vms"][0]["accelerator"] == "tcg"


@pytest.mark.parametrize("command", sorted(pki.commands))
def test_help_of_pki_has_an_example(run: Run, command: str) -> None:
    code, out, err = run("pki", command, "--help")
    assert (code, err) == (0, "")
    assert f"qsnap pki {command}" in out.partition("Example:")[2]


def test_identities(run: Run, tmp_path: Path) -> None:
    """Each command says what comes next, and that works."""
    ca = str(tmp_path / "ca")
    code, out, err = run("pki", "init", ca)
    assert (code, err) == (0, "")
    assert f"qsnap pki issue {ca} alpha" in out
    assert run("pki", "issue", ca, "alpha")[0] == 0
    identity = str(tmp_path / "beta.pem")
    code, out, _ = run("pki", "issue", ca, "beta", "-o", identity, "--vne", "lab-*", "--vne", "demo", "--days", "9")
    assert code == 0
    assert "qsnap agent --identity beta.pem" in out
    beta = load_identity(Path(identity))
    assert peer_of(beta.certificate).vnes == ("lab-*", "demo")
    code, out, _ = run("--json", "pki", "revoke", ca, "alpha", identity)
    assert (code, json.loads(out)) == (0, {"name": "alpha", "revoked": 1})
    assert load_identity(Path(identity)).crl_pem == Path(ca, "crl.pem").read_text()


def test_an_identity_as_json(run: Run, tmp_path: Path) -> None:
    ca = tmp_path / "ca"
    run("pki", "init", str(ca))
    answer = json.loads(run("pki", "issue", str(ca), "alpha", "--json")[1])
    expires = load_identity(ca / "alpha.pem").expires.isoformat()
    assert answer == {"name": "alpha", "file": str(ca / "alpha.pem"), "vnes": [], "expires": expires}


@pytest.mark.parametrize(
    ("words", "code", "line"),
    [
        (("issue", "CA", "Beta"), 4, "qsnap: 'Beta' cannot name a host"),
        (("issue", "CA", "alpha"), 14, "qsnap: CA: there is no certificate authority"),
        (("revoke", "CA", "alpha"), 14, "qsnap: CA: there is no certificate authority"),
        (("init", "/proc/none/ca"), 6, "qsnap: /proc/none/ca: No such file or directory"),
    ],
)
def test_an_error_of_pki(run: Run, words: tuple[str, ...], code: int, line: str) -> None:
    found, out, err = run("pki", *words)
    assert (found, out) == (code, "")
    assert err.startswith(line)


def test_the_unit_for_systemd_runs_this_agent_and_spares_its_vms(run: Run, tmp_path: Path) -> None:
    directory = tmp_path / 'with "odd" $names'
    code, out, _ = run("agent", "--unit", "--port", "7000", "--allow", "lab-*", "--run-dir", str(directory))
    assert code == 0
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(out)
    assert unit["Service"]["KillMode"] == "process"
    command = unit["Service"]["ExecStart"].replace("$$", "$").replace("%%", "%")
    words = shlex.split(command)
    assert words[:4] == [sys.executable, "-m", "qsnap.cli", "agent"]
    assert words[words.index("--run-dir") + 1] == str(directory)
    assert words[words.index("--allow") + 1] == "lab-*"


def test_hosts_of_a_vne_that_has_none(run: Run) -> None:
    code, _, error = run("hosts", "lab")
    assert code == qsnap.StateError.exit_code
    assert "not spread over hosts" in error
