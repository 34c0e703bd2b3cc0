"""Test guests that send to each other as fast as they can, and count (`testbed/guest`)."""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from struct import Struct

import trio
from attrs import define

from qsnap.host.netns import entered
from qsnap.rules.colouring import tap_name
from scenarios.partition.check import Outcome, Verdict, check
from scenarios.scenario import Scenario
from testbed.guests import GuestConsole
from testbed.state import check_stamps, find_orphans, read_state
from testbed.tasks import together

WHOLE, SHORT = 50_000, 4_000  #: datagrams from each guest to each other one
ANSWER_S, FINISH_S = 60.0, 120.0
POLL_S = 0.1
ETH_P_ALL, IPV4 = 3, b"\x08\0"  # linux/if_ether.h
CHECKSUM = 14 + 20 + 6  #: where that of UDP is, in a frame without options of IP
PEER = Struct("3i")  # struct ucred: pid, uid, gid


def judge(images: Mapping[str, Sequence[Path]]) -> Verdict:
    """Hold what each guest says in its image against what the others say, and its pages against their stamps."""
    files = [tuple(each) for each in images.values()]
    states = [read_state(each) for each in files]
    reports = [check_stamps(each, state) for each, state in zip(files, states, strict=True)]
    return Verdict(
        sum(sum(state.sent) for state in states),
        len(find_orphans(states)),
        sum(len(report.wrong) + len(report.missing) + report.miscounted for report in reports),
    )


@define
class Partition:
    """The guests at their work, which begins when they have booted."""

    guests: Mapping[str, GuestConsole]
    datagrams: int

    @property
    def logs(self) -> str:
        """Nothing but the console has what they say."""
        return ""

    async def start(self) -> None:
        """Wait until all exchange traffic."""
        await together(guest.boot for guest in self.guests.values())

    async def progress(self) -> dict[str, float]:
        """The share of its datagrams that each guest has sent, to the peer that got the fewest."""
        with trio.fail_after(ANSWER_S):
            states = await together(guest.status for guest in self.guests.values())
        fewest = [min(sent for peer, sent in enumerate(state.sent, 1) if peer != state.id) for state in states]
        return {name: min(1.0, sent / self.datagrams) for name, sent in zip(self.guests, fewest, strict=True)}

    async def outcome(self) -> Outcome:
        """What all have counted, once their streams have ended."""
        with trio.fail_after(FINISH_S):
            return tuple(await together(guest.finish for guest in self.guests.values()))

    async def spoil(self) -> None:
        """For the negative control: a datagram comes to the first guest a second time."""
        guest = next(iter(self.guests.values()))
        with trio.fail_after(ANSWER_S):
            await trio.to_thread.run_sync(_repeat_datagram, guest.path)
            while not sum((await guest.status()).duplicates):
                await trio.sleep(POLL_S)


def _repeat_datagram(console: str) -> None:
    """Send the next datagram to the VM with this console once more."""
    with socket.socket(socket.AF_UNIX) as stream:
        stream.connect(console)
        pid, _, _ = PEER.unpack(stream.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, PEER.size))
    with entered(f"/proc/{pid}/ns/net"), socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as tap:
        tap.bind((tap_name(0, 0), ETH_P_ALL))
        tap.settimeout(ANSWER_S)
        while True:
            frame, (_, _, way, _, _) = tap.recvfrom(65536)
            if way == socket.PACKET_OUTGOING and frame[12:14] == IPV4 and frame[23] == socket.IPPROTO_UDP:
                tap.send(
                    frame[:CHECKSUM] + b"\0\0" + frame[CHECKSUM + 2 :]
                )  # none: its sender left it to the network card
                return


def make(guests: Mapping[str, GuestConsole], short: bool) -> Partition:
    """These guests, at work since they have booted."""
    return Partition(guests, SHORT if short else WHOLE)


SCENARIO = Scenario(
    name="partition",
    claim="A hundred snapshots of guests that send at full rate: each is a consistent cut, and can be gone on from.",
    make=make,
    check=check,
    fewest_vms=3,
    short_vms=3,
    shells=False,
    judge=judge,
    epochs=False,  # images tell it sooner
    snapshots=100,
)
