"""qsnap without root: a real ordinary user, their real namespaces, and what they are told where a privilege lacks."""

from __future__ import annotations

import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator

import pytest
import trio
from attrs import evolve

import qsnap
from tests.live.lab import GUEST, QEMU_11, judge
from tests.live.ordinary import TIMEOUT_S, OrdinaryUser, ordinary_user

pytestmark = pytest.mark.live

ALICE, BOB = (2_000_000 + 2 * os.getpid() + each for each in (0, 1))  # no other run of the tests has these

LAB = f"""
name = "lab"
[network.lan]
[vm.one]
accelerator = "tcg"
qemu = "{QEMU_11}"
kernel = "{GUEST / "vmlinuz"}"
initrd = "{GUEST / "initrd"}"
network = "lan"
"""

SCRIPT = """
import trio
import qsnap

async def main():
    await qsnap.restore("eleven", "booted", ram=qsnap.RamMode.EAGER)
    saved = await qsnap.snapshot("eleven", "by-script", engine=qsnap.Engine.BACKGROUND)
    await qsnap.down("eleven")
    print(saved.discrepancy_ms)

trio.run(main)
"""


@pytest.fixture
def alice() -> Iterator[OrdinaryUser]:
    with ordinary_user(ALICE) as user:
        write_lab(user)
        yield user
        (user.home / "lab.toml").unlink()


@pytest.fixture
def saved(alice: OrdinaryUser, golden: qsnap.Place) -> OrdinaryUser:
    """A user who has a snapshot `booted` of the VNE `eleven`."""
    store = alice.place.store
    shutil.copytree(golden.store / "eleven", store / "eleven")
    for path in (alice.home / ".local", *(alice.home / ".local").rglob("*")):
        os.chown(path, ALICE, ALICE)
    return alice


def write_lab(user: OrdinaryUser, backing: str = "anonymous", memory: str = "96M") -> str:
    """A description of one VM."""
    path = user.home / "lab.toml"
    path.write_text(f'{LAB}backing = "{backing}"\nmemory = "{memory}"\n')
    os.chown(path, user.uid, user.uid)
    return str(path)


def snapshot_of(user: OrdinaryUser, name: str) -> qsnap.Snapshot:
    """A snapshot of the user's `eleven`."""
    return trio.run(lambda: qsnap.show("eleven", name, place=user.place))


def test_commands(saved: OrdinaryUser) -> None:
    """All commands in their usual directories; both cuts are consistent; nobody else can read what is stored."""
    saved.qsnap("up", str(saved.home / "lab.toml"))
    (vne,) = saved.json("ps")
    netns = vne["netns"]
    assert os.stat(netns).st_ino != os.stat("/proc/self/ns/net").st_ino
    saved.qsnap("down", "lab")
    assert not saved.processes()

    saved.qsnap("restore", "eleven", "booted")
    for cut in ("colour", "barrier"):
        told = saved.json("snapshot", "eleven", cut, "--cut", cut)
        assert [vm["engine"] for vm in told["vms"]] == ["precopy"] * 3
        saved.qsnap("verify", "eleven", cut)
        verdict = judge(snapshot_of(saved, cut), saved.place)
        assert (verdict.orphans, verdict.wrong_stamps) == (0, 0)
        assert all(sum(state.received) for state in verdict.states)
    saved.qsnap("down", "eleven")
    saved.qsnap("restore", "eleven", "barrier")
    assert [vm["state"] for vm in saved.json("ps", "eleven")["vms"]] == ["running"] * 3
    for path in (saved.place.run, *saved.place.store.glob("eleven/snapshots/colour/**/*")):
        assert path.stat().st_mode & 0o077 == 0
    saved.qsnap("down", "eleven")


def test_library(saved: OrdinaryUser) -> None:
    """A script needs nothing but `import qsnap`; with access to /dev/userfaultfd it may take background."""
    user = evolve(saved, devices={**saved.devices, "/dev/userfaultfd": 0o666})
    assert float(user.run(sys.executable, "-c", SCRIPT)) >= 0
    verdict = judge(snapshot_of(user, "by-script"), user.place)
    assert (verdict.orphans, verdict.wrong_stamps) == (0, 0)


def test_background_refused(saved: OrdinaryUser) -> None:
    """Without userfaultfd: what is to be set."""
    saved.qsnap("restore", "eleven", "booted")
    told = saved.qsnap("snapshot", "eleven", "x", "--engine", "background", code=7)
    assert "vm.unprivileged_userfaultfd=1" in told
    assert "/dev/userfaultfd" in told


def test_huge_pages_refused(alice: OrdinaryUser) -> None:
    """A pool that is too small cannot be made larger."""
    told = alice.qsnap("up", write_lab(alice, backing="hugetlb", memory="512G"), code=6)
    assert "vm.nr_hugepages" in told
    assert alice.qsnap("ps") == "No VNE is up.\n"


def test_taps_refused(alice: OrdinaryUser) -> None:
    """A closed /dev/net/tun."""
    user = evolve(alice, devices={"/dev/net/tun": 0o600})
    told = user.qsnap("up", str(alice.home / "lab.toml"), code=6)
    assert "chmod 666 /dev/net/tun" in told


@pytest.mark.parametrize(
    ("device", "ability", "remedy"),
    [("/dev/net/tun", "networks", "chmod 666"), ("/dev/userfaultfd", "userfaultfd", "sysctl")],
)
def test_abilities(alice: OrdinaryUser, device: str, ability: str, remedy: str) -> None:
    """What is told of a host where a device is open, and of one where it is closed."""
    for mode in (0o666, 0o600):
        user = evolve(alice, devices={**alice.devices, device: mode})
        found = {each["name"]: each for each in user.json("host")}
        assert found["QEMU"]["here"]
        assert found[ability]["here"] == (mode == 0o666)
        assert (remedy in found[ability]["remedy"]) == (mode == 0o600)


@pytest.mark.parametrize("switch", ["max_user_namespaces", "max_net_namespaces"])
def test_namespaces_refused(alice: OrdinaryUser, switch: str) -> None:
    """No namespaces for users: which setting forbids them. Here one that counts for a user namespace alone."""
    inner = f'echo 0 >/proc/sys/user/{switch}; exec setpriv --bounding-set=-all --inh-caps=-all -- "$@"'
    command = (sys.executable, "-m", "qsnap.cli", "--run-dir", str(alice.place.run), "--store", str(alice.place.store))
    told = alice.run(
        *("unshare", "--user", "--map-root-user", "--net", "bash", "-c", inner, "bash"),
        *(*command, "up", str(alice.home / "lab.toml")),
        code=6,
    )
    assert f"sysctl user.{switch}=" in told


def test_apart(alice: OrdinaryUser, place: qsnap.Place) -> None:
    """Two users and root each have a VNE of the same name, and no way to the others'."""
    with ordinary_user(BOB) as bob:
        users = (alice, bob)
        for user in users:
            user.qsnap("up", write_lab(user))
        trio.run(lambda: qsnap.up(qsnap.load_description(alice.home / "lab.toml"), place=place))
        namespaces = {os.stat(user.json("ps")[0]["netns"]).st_ino for user in users}
        assert len(namespaces) == 2
        assert "Permission denied" in bob.qsnap("--run-dir", str(place.run), "down", "lab", code=6)
        bob.qsnap("down", "lab")
        assert alice.json("ps")[0]["vms"][0]["state"] == "running"
        with pytest.raises(qsnap.HostError, match=f"belongs to user {ALICE}"):
            trio.run(lambda: qsnap.down("lab", place=alice.place))
        (bob.home / "lab.toml").unlink()
    alice.qsnap("down", "lab")
    assert trio.run(lambda: qsnap.status("lab", place=place)).vms[0].state == "running"


def test_dead_vms(saved: OrdinaryUser) -> None:
    """A namespace is found through whichever VM lives. With the last VM it is gone, and the VNE can be restored."""
    saved.qsnap("restore", "eleven", "booted")
    before = saved.json("ps", "eleven")
    first, *others = [vm["pid"] for vm in before["vms"]]
    namespace = os.stat(before["netns"]).st_ino
    kill(first)
    now = saved.json("ps", "eleven")
    assert [vm["state"] for vm in now["vms"]] == ["dead", "running", "running"]
    assert os.stat(now["netns"]).st_ino == namespace
    assert "vm1 is dead" in saved.qsnap("snapshot", "eleven", code=4)
    kill(*others)
    assert saved.json("ps", "eleven")["netns"] == ""
    saved.qsnap("restore", "eleven", "booted")
    assert [vm["state"] for vm in saved.json("ps", "eleven")["vms"]] == ["running"] * 3
    saved.qsnap("down", "eleven")


def test_killed_while_starting(saved: OrdinaryUser) -> None:
    """qsnap itself is killed when the VMs start: the next one starts over."""
    begin_and_kill(saved, "restore", "eleven", "booted", once=(saved.place.run / "eleven/vm1/qmp.sock").exists)
    saved.qsnap("restore", "eleven", "booted")
    assert [vm["state"] for vm in saved.json("ps", "eleven")["vms"]] == ["running"] * 3
    saved.qsnap("down", "eleven")
    assert not saved.processes()


def test_killed_while_saving(saved: OrdinaryUser) -> None:
    """qsnap is killed when it has begun to save: the next one undoes that, also where the namespace is gone."""
    journal = saved.place.run / "eleven.journal"

    def captures() -> bool:
        return journal.exists() and journal.read_text().count('"member"') == 3

    saved.qsnap("restore", "eleven", "booted")
    begin_and_kill(saved, "snapshot", "eleven", "broken", once=captures)
    saved.qsnap("snapshot", "eleven", "after")
    verdict = judge(snapshot_of(saved, "after"), saved.place)
    assert (verdict.orphans, verdict.wrong_stamps) == (0, 0)
    begin_and_kill(saved, "snapshot", "eleven", "broken", once=captures)
    kill(*(vm["pid"] for vm in saved.json("ps", "eleven")["vms"]))
    saved.qsnap("restore", "eleven", "after")
    assert [each["name"] for each in saved.json("ls", "eleven")] == ["booted", "after"]
    saved.qsnap("down", "eleven")


def begin_and_kill(user: OrdinaryUser, *words: str, once: Callable[[], bool]) -> None:
    """Start a command of qsnap, and kill it once something holds."""
    with user.start(sys.executable, "-m", "qsnap.cli", *words) as process:
        deadline = time.monotonic() + TIMEOUT_S
        while not once():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        process.kill()


def kill(*pids: int) -> None:
    """Kill these VMs, and return when they are dead."""
    for pid in pids:
        fd = os.pidfd_open(pid)
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        assert select.select([fd], [], [], TIMEOUT_S)[0]
        os.close(fd)
