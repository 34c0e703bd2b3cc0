"""Runs in a guest: asks a web server for files, request after request, and looks at every byte of every answer.

    client.py ADDRESS REQUESTS PER_SECOND SEED SHA256...

File N of the server has the Nth digest. Connections are kept until the server closes them between two answers; one
that ends anywhere else is broken. /run/progress has how many requests are done; in the end /run/result has a word and
its value per line. `latency` has for each second, by the guest's clock, the slowest answer in ms.
"""

from __future__ import annotations

import hashlib
import os
import random
import socket
import sys
import time

TIMEOUT_S = 20.0


class Server:
    """Connections to the server, one after the other."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.connections = 0
        self.stream: socket.socket | None = None
        self.received = b""

    def get(self, path: str) -> bytes:
        """The body of an answer. OSError where the connection broke."""
        if self.stream is None:
            self.stream = socket.create_connection((self.address, 80), TIMEOUT_S)
            self.connections += 1
        self.stream.sendall(f"GET {path} HTTP/1.1\r\nHost: {self.address}\r\n\r\n".encode())
        while b"\r\n\r\n" not in self.received:
            self.read()
        head, _, self.received = self.received.partition(b"\r\n\r\n")
        status, *lines = head.decode().lower().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        size = int(headers["content-length"])
        while len(self.received) < size:
            self.read()
        body, self.received = self.received[:size], self.received[size:]
        if headers.get("connection") == "close":
            self.drop()
        return body if status.split()[1] == "200" else b""

    def read(self) -> None:
        """Some more of an answer."""
        assert self.stream is not None
        data = self.stream.recv(65536)
        if not data:
            raise ConnectionError("the connection ended in the middle of an answer")
        self.received += data

    def drop(self) -> None:
        """Have no connection."""
        if self.stream is not None:
            self.stream.close()
        self.stream, self.received = None, b""


def tell(path: str, text: str) -> None:
    """Write a file so that it is never seen half written."""
    with open(f"{path}.new", "w") as file:
        file.write(text)
    os.rename(f"{path}.new", path)


def main() -> None:
    """All requests."""
    address, count, rate, seed, *digests = sys.argv[1:]
    server, choice = Server(address), random.Random(int(seed))
    everything = hashlib.sha256()
    wrong, broken, octets = 0, 0, 0
    latency: dict[int, float] = {}
    begun_s = time.monotonic()
    for number in range(int(count)):
        time.sleep(max(0.0, begun_s + number / float(rate) - time.monotonic()))
        which = choice.randrange(len(digests))
        sent_s = time.monotonic()
        try:
            body = server.get(f"/{which}")
        except OSError:
            broken, body = broken + 1, b""
            server.drop()
        took_ms = (time.monotonic() - sent_s) * 1e3
        second = int(sent_s - begun_s)
        latency[second] = max(latency.get(second, 0.0), took_ms)
        wrong += hashlib.sha256(body).hexdigest() != digests[which]
        everything.update(body)
        octets += len(body)
        tell("/run/progress", str(number + 1))
    series = ",".join(f"{latency.get(second, 0.0):.1f}" for second in range(max(latency) + 1))
    result = {
        "requests": count,
        "wrong": wrong,
        "broken": broken,
        "connections": server.connections,
        "bytes": octets,
        "sha256": everything.hexdigest(),
        "latency": series,
    }
    tell("/run/result", "".join(f"{name} {value}\n" for name, value in result.items()))


if __name__ == "__main__":
    main()
