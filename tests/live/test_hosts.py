"""The test bed of hosts: cables that can be pulled, routers, and links as bad as are asked for."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import AsyncIterator

import pytest
import trio
from pyroute2 import netns

from qsnap.host.netns import entered
from testbed.hosts import NamespaceHost, hosts_in_namespaces

PORT = 9
ROUND_TRIP_S = 5.0
Hosts = dict[str, NamespaceHost]


def open_socket(host: NamespaceHost, kind: socket.SocketKind = socket.SOCK_DGRAM) -> socket.socket:
    with entered(host.netns):
        opened = socket.socket(socket.AF_INET, kind)
    opened.settimeout(ROUND_TRIP_S)
    return opened


@pytest.fixture
async def hosts() -> AsyncIterator[Hosts]:
    async with hosts_in_namespaces(["alpha", "beta", "gamma"], behind={"gamma": "router"}) as hosts:
        yield hosts


def is_answered(client: NamespaceHost, server: NamespaceHost, patience_s: float = ROUND_TRIP_S) -> bool:
    """Whether a datagram gets there, and the answer back."""
    with open_socket(server) as there, open_socket(client) as here:
        there.bind((server.address, PORT))
        for end in (there, here):
            end.settimeout(patience_s)
        try:
            here.sendto(b"question", (server.address, PORT))
            there.sendto(b"answer", there.recvfrom(100)[1])
            return here.recv(100) == b"answer"
        except OSError:  # nothing came, or there is no way
            return False


async def test_hosts_reach_each_other_and_who_is_behind_a_router_is_not_reached(hosts: Hosts) -> None:
    alpha, beta, gamma = hosts.values()
    assert is_answered(alpha, beta)
    assert is_answered(gamma, alpha)
    assert is_answered(gamma, beta)
    assert not is_answered(alpha, gamma, patience_s=0.2)


async def test_a_command_runs_on_its_host(hosts: Hosts) -> None:
    for host in hosts.values():
        told = await trio.run_process(host.command(["ip", "-br", "address"]), capture_stdout=True)
        assert host.address in told.stdout.decode()
        assert host.name != "gamma" or "10.77" not in told.stdout.decode()


async def test_a_cable_can_be_pulled_and_put_back(hosts: Hosts) -> None:
    alpha, beta, _ = hosts.values()
    await beta.unplug()
    assert not is_answered(alpha, beta, patience_s=0.2)
    await beta.plug()
    with trio.fail_after(20):
        while not is_answered(alpha, beta, patience_s=0.2):
            await trio.sleep(0.01)


async def test_a_bad_link_loses_frames_and_is_slow(hosts: Hosts) -> None:
    alpha, beta, _ = hosts.values()
    assert is_answered(alpha, beta)  # so that both know each other's hardware addresses
    async with beta.bad_link(delay_s=0.2, loss=0.3):
        with open_socket(beta) as there, open_socket(alpha) as here:
            there.bind((beta.address, PORT))
            began = time.monotonic()
            for _ in range(300):
                here.sendto(b"x", (beta.address, PORT))
            there.recv(10)
            assert time.monotonic() - began >= 0.2
            there.settimeout(0.5)
            assert 180 < 1 + sum(1 for _ in iter(lambda: receives(there), False)) < 240
        await beta.unplug()
        await beta.plug()
    assert is_answered(alpha, beta)


def receives(end: socket.socket) -> bool:
    try:
        return bool(end.recv(10))
    except TimeoutError:
        return False


async def test_tcp_sees_a_bad_link_and_gets_through(hosts: Hosts) -> None:
    alpha, beta, _ = hosts.values()
    async with beta.bad_link(delay_s=0.01, loss=0.1):
        sent, resent = await trio.to_thread.run_sync(stream, alpha, beta, bytes(range(256)) * 800)
    assert sent
    assert resent > 0
    sent, _ = await trio.to_thread.run_sync(stream, alpha, beta, bytes(1000))
    assert sent


def stream(client: NamespaceHost, server: NamespaceHost, data: bytes) -> tuple[bool, int]:
    """Whether all of `data` arrives over TCP, and how many packets were sent again for that."""
    with open_socket(server, socket.SOCK_STREAM) as listener, open_socket(client, socket.SOCK_STREAM) as here:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((server.address, PORT))
        listener.listen()
        for each in (listener, here):
            each.settimeout(60)
        received: list[bytes] = []

        def serve() -> None:
            with listener.accept()[0] as there:
                there.settimeout(60)
                while chunk := there.recv(1 << 16):
                    received.append(chunk)

        serving = threading.Thread(target=serve)
        serving.start()
        here.connect((server.address, PORT))
        here.sendall(data)
        here.shutdown(socket.SHUT_WR)
        serving.join()
        info = here.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
        return b"".join(received) == data, int.from_bytes(info[100:104], "little")  # tcpi_total_retrans


async def test_nothing_is_left() -> None:
    async with hosts_in_namespaces(["alpha"]) as hosts:
        run = hosts["alpha"].netns.rpartition("-")[0]
        assert sorted(name for name in netns.listnetns() if name.startswith(run)) == [f"{run}-alpha", f"{run}-switch"]
    assert not [name for name in netns.listnetns() if name.startswith(run)]


async def test_two_test_beds_are_apart(hosts: Hosts) -> None:
    async with hosts_in_namespaces(["alpha", "beta"]) as others:
        assert is_answered(others["alpha"], others["beta"])
        assert not is_answered(hosts["alpha"], others["beta"], patience_s=0.2)
