"""Run an experiment again and again from the very same state of a whole VNE.

python repeat.py lab booted 10
"""

import sys

import trio

import qsnap


async def experiment(vne: str, place: qsnap.Place) -> str:
    """Whatever you want to find out; here only what the VMs do after a second."""
    await trio.sleep(1)
    status = await qsnap.status(vne, place=place)
    return ", ".join(f"{vm.name} {vm.state}" for vm in status.vms)


async def main(vne: str, snapshot: str, times: int, place: qsnap.Place) -> None:
    for number in range(times):
        report = await qsnap.restore(vne, snapshot, place=place)
        try:
            print(f"run {number}, ready after {report.ready_ms:.0f} ms: {await experiment(vne, place)}")
        finally:
            with trio.CancelScope(shield=True):
                await qsnap.down(vne, place=place)


if __name__ == "__main__":
    name, saved, count = sys.argv[1:]
    trio.run(main, name, saved, int(count), qsnap.Place())
