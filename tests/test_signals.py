"""Signals come when they like. None is lost, and none gets between the steps of what undoes."""

from __future__ import annotations

import signal
import subprocess
import sys
import weakref
from collections.abc import Iterator

import pytest
import trio

from qsnap.cli.signals import ENDING, interrupt_on_signals, run_until_signal
from qsnap.host.interrupts import interruptible

LONG_S = 30.0


class _Gone:
    """Something to be told the end of."""


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """As the command line sets them up."""
    before = {number: signal.getsignal(number) for number in ENDING}
    interrupt_on_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_without_one_the_answer_is_returned() -> None:
    async def work() -> int:
        return 5

    assert run_until_signal(work) == 5


STARTING = """
import signal, sys
from qsnap.cli import main

class Slow:
    def find_spec(name, *rest):
        if name == "qsnap.cli.run":
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Slow)
sys.exit(main(["ps"]))
"""


def test_while_the_program_is_still_being_loaded() -> None:
    done = subprocess.run([sys.executable, "-c", STARTING], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "qsnap: interrupted\n")


@pytest.mark.parametrize("number", ENDING)
def test_in_a_callback_that_may_not_raise(number: signal.Signals) -> None:
    async def work() -> None:
        gone = _Gone()
        watch = weakref.ref(gone, lambda _: signal.raise_signal(number))
        del gone
        assert watch() is None
        with trio.fail_after(LONG_S):
            await trio.sleep_forever()

    with pytest.raises(KeyboardInterrupt):
        run_until_signal(work)


@pytest.mark.parametrize("number", ENDING)
def test_while_something_is_undone(number: signal.Signals) -> None:
    undone = []

    async def work() -> None:
        try:
            signal.raise_signal(number)
            with trio.fail_after(LONG_S):
                await trio.sleep_forever()
        finally:
            for step in range(3):
                signal.raise_signal(number)
                with trio.CancelScope(shield=True):
                    await trio.sleep(0.01)
                undone.append(step)

    with pytest.raises(KeyboardInterrupt):
        run_until_signal(work)
    assert undone == [0, 1, 2]


def test_an_error_while_something_is_undone() -> None:
    async def work() -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
            with trio.fail_after(LONG_S):
                await trio.sleep_forever()
        finally:
            raise LookupError

    with pytest.raises(LookupError):
        run_until_signal(work)


def test_one_that_is_ignored() -> None:
    async def work() -> int:
        signal.raise_signal(signal.SIGHUP)
        await trio.sleep(0.05)
        return 5

    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    assert run_until_signal(work) == 5


def test_in_a_script() -> None:
    """Where Ctrl-C comes is no matter: it waits until what was begun is undone."""
    undone = []

    @interruptible
    async def work(number: int) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
            with trio.fail_after(LONG_S):
                await trio.sleep_forever()
        finally:
            undone.append(number)

    with pytest.raises(KeyboardInterrupt):
        trio.run(work, 7)
    assert undone == [7]


def test_in_a_script_that_does_two_things_at_once() -> None:
    undone = []

    @interruptible
    async def work(number: int) -> None:
        try:
            await trio.sleep(0.01 * number)
            if number == 3:
                signal.raise_signal(signal.SIGINT)
            await trio.sleep(0.01 * number)
        finally:
            undone.append(number)

    async def main(*numbers: int) -> None:
        async with trio.open_nursery() as nursery:
            for number in numbers:
                nursery.start_soon(work, number)

    trio.run(main, 1, 2)
    assert undone == [1, 2]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(BaseExceptionGroup) as caught:
        trio.run(main, 3, 4)
    assert caught.group_contains(KeyboardInterrupt)
    assert {3, 4} <= set(undone)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_in_a_script_that_heeds_signals_itself() -> None:
    @interruptible
    async def work() -> int:
        signal.raise_signal(signal.SIGINT)
        await trio.sleep(0.05)
        return 5

    async def main() -> tuple[int, int]:
        with trio.open_signal_receiver(signal.SIGINT) as signals, trio.fail_after(LONG_S):
            done = await work()
            return done, await anext(aiter(signals))

    assert trio.run(main) == (5, signal.SIGINT)


def test_in_a_script_before_anything_is_begun() -> None:
    begun = []

    @interruptible
    async def work() -> None:
        begun.append(True)

    async def main() -> None:
        signal.raise_signal(signal.SIGINT)  # trio keeps it for the next checkpoint
        await work()

    with pytest.raises(KeyboardInterrupt):
        trio.run(main, restrict_keyboard_interrupt_to_checkpoints=True)
    assert not begun
