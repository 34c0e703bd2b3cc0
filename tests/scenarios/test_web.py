"""The check of the scenario `web`, on a good history and on bad ones; and what its client tells."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from attrs import evolve

from scenarios.history import History, Run, Way
from scenarios.web.check import Load, Outcome, check
from scenarios.web.workload import expect, parse_load
from tests.scenarios.histories import sample

LOAD = Load("client-1", "100:7", 3, 0, 0, 1, 60, "aa" * 32, (5.0, 80.5))
TOLD = f"process 100:7\nrequests 3\nwrong 0\nbroken 0\nconnections 1\nbytes 60\nsha256 {'aa' * 32}\nlatency 5.0,80.5"
GOOD = Outcome((LOAD,), {"client-1": (3, 60, "aa" * 32)})
RIGHT, CONNECTIONS, PROCESSES = "Every answer is right, to the byte", "No connection broke", "What was restored went on"


def history(restored: Outcome = GOOD) -> History[Outcome]:
    samples = (sample(0, 0.5, 0.5), sample(1, 1, 1))
    first = Run(Way.UNINTERRUPTED, evolve(GOOD, loads=(evolve(LOAD, process="100:6"),)), {}, samples)
    second = Run(Way.SNAPSHOTTED, GOOD, {}, samples)
    return History((first, second, Run(Way.RESTORED, restored, {}, samples, origin="one")))


def refuted(judged: History[Outcome]) -> list[str]:
    return [finding.claim.split(":")[0].rstrip(".") for finding in check(judged) if not finding.held]


def test_a_good_history() -> None:
    assert refuted(history()) == []


BAD: dict[str, tuple[Callable[[Load], Load], list[str]]] = {
    "a wrong answer": (lambda load: evolve(load, wrong=1), [RIGHT]),
    "other answers": (lambda load: evolve(load, sha256="bb" * 32), [RIGHT]),
    "an answer less": (lambda load: evolve(load, requests=2), [RIGHT]),
    "a byte less": (lambda load: evolve(load, bytes=59), [RIGHT]),
    "another client": (lambda load: evolve(load, guest="client-2", process="100:7"), [RIGHT, PROCESSES]),
    "a broken connection": (lambda load: evolve(load, broken=1), [CONNECTIONS]),
    "another process": (lambda load: evolve(load, process="100:8"), [PROCESSES]),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_run(name: str) -> None:
    change, claims = BAD[name]
    assert refuted(history(evolve(GOOD, loads=(change(LOAD),)))) == claims


def test_no_client_at_all() -> None:
    assert refuted(history(evolve(GOOD, loads=()))) == [RIGHT]


def test_what_a_client_tells() -> None:
    assert parse_load("client-1", TOLD) == LOAD


def test_what_a_client_is_to_get_depends_on_its_seed_and_the_files() -> None:
    files = [b"a" * 10, b"b" * 20]
    assert expect(files, 50, 1) == expect(files, 50, 1)
    assert len({expect(files, 50, 1), expect(files, 50, 2), expect([b"a" * 10, b"c" * 20], 50, 1)}) == 3
