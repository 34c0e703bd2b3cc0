"""Save a VNE that is up every so many seconds, and keep the newest few snapshots, until Ctrl-C.

python every.py lab 60 5
"""

import sys

import trio

import qsnap


async def main(vne: str, period_s: float, kept: int, place: qsnap.Place) -> None:
    while True:
        saved = await qsnap.snapshot(vne, place=place)
        worst = max(vm.measurements.downtime_ms for vm in saved.vms)
        print(f"{saved.name}: no VM was paused for more than {worst:.1f} ms")
        for old in (await qsnap.snapshots(vne, place=place))[:-kept]:
            await qsnap.remove(vne, old.name, place=place)
        await trio.sleep(period_s)


if __name__ == "__main__":
    name, seconds, number = sys.argv[1:]
    trio.run(main, name, float(seconds), int(number), qsnap.Place())
