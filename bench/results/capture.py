"""The TCP segments that a VM sends, seen on its tap. What is parsed is hostile input: frames come from guests."""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import trio
from attrs import define, field, frozen

from qsnap.host.clock import steady_s
from qsnap.host.netns import run_in_netns

ETH_P_ALL = 0x0003  #: linux/if_ether.h
SO_RCVBUFFORCE, SO_TIMESTAMPNS = 33, 35  #: asm-generic/socket.h
SOL_PACKET, PACKET_STATISTICS = 263, 6  #: linux/if_packet.h
TIMESPEC = struct.Struct("@qq")
STATISTICS = struct.Struct("@II")  #: packets, drops
HEAD_BYTES = 128  #: of each frame: Ethernet, IPv4 and TCP with all options
BUFFER_BYTES = 64 << 20
ETHERNET_BYTES, IP_BYTES, TCP_BYTES = 14, 20, 20
IPV4, TCP = 0x0800, 6
SEQUENCES = 1 << 32


@frozen
class Flow:
    """One direction of a TCP connection. Addresses are IPv4, 4 bytes."""

    source: bytes
    source_port: int
    target: bytes
    target_port: int


@frozen
class Segment:
    """A TCP segment: its sequence number, and the bytes of data in it."""

    flow: Flow
    sequence: int
    data_bytes: int


def parse_segment(frame: bytes) -> Segment | None:
    """The segment in an Ethernet frame, of which there need be no more than the headers. None for what is no TCP."""
    if len(frame) < ETHERNET_BYTES + IP_BYTES or int.from_bytes(frame[12:14], "big") != IPV4:
        return None
    ip = frame[ETHERNET_BYTES:]
    ip_bytes, total_bytes = (ip[0] & 0xF) * 4, int.from_bytes(ip[2:4], "big")
    later_fragment = int.from_bytes(ip[6:8], "big") & 0x1FFF
    tcp = ip[ip_bytes:]
    if ip[0] >> 4 != 4 or ip_bytes < IP_BYTES or ip[9] != TCP or later_fragment or len(tcp) < TCP_BYTES:
        return None
    source_port, target_port, sequence = struct.unpack_from(">HHI", tcp)
    data_bytes = total_bytes - ip_bytes - (tcp[12] >> 4) * 4
    if data_bytes < 0:
        return None
    return Segment(Flow(ip[12:16], source_port, ip[16:20], target_port), sequence, data_bytes)


def distance(sequence: int, since: int) -> int:
    """How far one sequence number is behind another; negative for one before it. They wrap at 2^32."""
    ahead = (sequence - since) % SEQUENCES
    return ahead - SEQUENCES if ahead >= SEQUENCES // 2 else ahead


@frozen
class Sent:
    """A segment with data, and when it was on the tap, on the clock of `qsnap.host.clock`.

    `end_bytes` is how far the flow has come with it: from the first segment of the flow that was seen.
    """

    instant_s: float
    flow: Flow
    data_bytes: int
    end_bytes: int


@define
class Flows:
    """All segments with data that a VM sent, in order."""

    sent: list[Sent] = field(factory=list)
    ends: dict[Flow, tuple[int, int]] = field(factory=dict)  #: the furthest of each: sequence number, and bytes

    def add(self, instant_s: float, segment: Segment) -> None:
        """Take note of a segment."""
        if not segment.data_bytes:
            return
        end = (segment.sequence + segment.data_bytes) % SEQUENCES
        at, at_bytes = self.ends.get(segment.flow, (segment.sequence, 0))
        end_bytes = at_bytes + distance(end, at)
        if end_bytes > at_bytes:
            self.ends[segment.flow] = end, end_bytes
        self.sent.append(Sent(instant_s, segment.flow, segment.data_bytes, end_bytes))

    @property
    def new_bytes(self) -> int:
        """What was sent so far and was not sent before, of all flows."""
        return sum(end_bytes for _, end_bytes in self.ends.values())


@define
class Capture:
    """A tap that is listened on. Made by `open_capture`."""

    flows: Flows = field(factory=Flows)
    _changed: trio.Event = field(factory=trio.Event)

    async def wait_new_bytes(self, count: int) -> None:
        """Return when the VM has sent so many bytes more that it had not sent yet."""
        goal = self.flows.new_bytes + count
        while self.flows.new_bytes < goal:
            await self._changed.wait()

    async def _listen(self, packets: trio.socket.SocketType) -> None:
        steady_from_wall_s = steady_s() - time.time()
        address: Any
        while True:
            frame, ancillary, _, address = await packets.recvmsg(HEAD_BYTES, socket.CMSG_SPACE(TIMESPEC.size))
            if address[2] == socket.PACKET_OUTGOING or not (segment := parse_segment(frame)):
                continue
            ((_, _, stamp),) = ancillary
            seconds, nanoseconds = TIMESPEC.unpack(stamp)
            self.flows.add(seconds + nanoseconds / 1e9 + steady_from_wall_s, segment)
            self._changed.set()
            self._changed = trio.Event()


def _open_packets(interface: str) -> socket.socket:
    packets = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK, 0)
    packets.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMPNS, 1)
    packets.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER_BYTES)
    packets.bind((interface, ETH_P_ALL))
    return packets


@asynccontextmanager
async def open_capture(netns: str, tap: str) -> AsyncIterator[Capture]:
    """Listen on a tap in a network namespace until the block ends. Needs privileges."""
    capture = Capture()
    packets = trio.socket.from_stdlib_socket(await run_in_netns(netns, partial(_open_packets, tap)))
    with packets:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(capture._listen, packets)
            yield capture
            nursery.cancel_scope.cancel()
        _, dropped = STATISTICS.unpack(packets.getsockopt(SOL_PACKET, PACKET_STATISTICS, STATISTICS.size))
    if dropped:
        raise RuntimeError(f"{dropped} frames on {tap} were not seen: the machine has too much else to do")
