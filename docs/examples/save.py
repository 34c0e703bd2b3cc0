"""Start the VNE of a description, save it while it runs, and go back to that moment.

python save.py lab.toml
"""

import sys

import trio

import qsnap


async def main(description: str, place: qsnap.Place) -> None:
    vne = qsnap.load_description(description)
    async with qsnap.running(vne, place=place):
        saved = await qsnap.snapshot(vne.name, "before", place=place)
        for vm in saved.vms:
            print(f"{vm.vm.name}: paused for {vm.measurements.downtime_ms:.1f} ms ({vm.engine.value}: {vm.reason})")
        print(f"The VMs stopped within {saved.discrepancy_ms:.1f} ms of each other")

    report = await qsnap.restore(vne.name, "before", place=place)
    print(f"{vne.name} runs as it did then, after {report.ready_ms:.0f} ms")
    await qsnap.down(vne.name, place=place)


if __name__ == "__main__":
    trio.run(main, sys.argv[1], qsnap.Place())
