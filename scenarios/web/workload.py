"""Apache on one guest, and on the others a client that checks each answer (`client.py`, which runs there)."""

from __future__ import annotations

import hashlib
import random
from base64 import b64encode
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from attrs import define
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from scenarios.scenario import Scenario
from scenarios.web.check import Load, Outcome, check
from testbed.shell import GuestShell
from testbed.tasks import together

CLIENT = Path(__file__).with_name("client.py").read_bytes()
SIZES = tuple(1 << power for power in range(9, 19))  #: of the files: 512 B to 256 KiB
WHOLE, SHORT = 3000, 600  #: requests of each client
SPOILED = 100  #: in the negative control
PER_SECOND = 40
SERVER = "10.1.0.1"

MAKE_FILE = "openssl enc -chacha20 -K {key:02x} -iv 00 -in /dev/zero 2>/dev/null | head -c {size} >/var/www/html/{key}"
#: Apache would end a connection that is idle for 5 s, as one on a busy host may be. It does so after 100 requests.
SERVE = """\
mkdir -p /run/apache2
(. /etc/apache2/envvars && apache2 -k start -c 'KeepAliveTimeout 600') 2>/dev/null
until curl -sf http://localhost/0 >/dev/null; do sleep 0.1; done
"""
LOAD = """\
rm -f /run/progress /run/result
base64 -d <<<'{client}' >/run/client.py
setsid python3 /run/client.py {server} {requests} {rate} {seed} {digests} >/run/client.log 2>&1 &
echo $! >/run/client.pid
until [[ -e /run/progress ]]; do sleep 0.1; done
echo $(</run/client.pid):$(cut -d ' ' -f 22 /proc/$(</run/client.pid)/stat) >/run/client.process
"""
#: A byte of the largest file is another one; then the server is killed under its client, and started again.
SPOIL_FILE = "printf x | dd of=/var/www/html/{key} bs=1 seek=1000 conv=notrunc status=none"
KILL = "pkill -9 apache2; rm -f /run/apache2/*.pid; sleep 1"
DESCRIBE = "until [[ -e /run/result ]]; do sleep 0.1; done; echo process $(</run/client.process); cat /run/result"
LOGS = "cat /run/client.log; tail -n 20 /var/log/apache2/error.log; ss -tn | head -n 30"


def file_bytes(key: int, size: int) -> bytes:
    """What MAKE_FILE makes, computed here."""
    stream = Cipher(ChaCha20(bytes([key]).ljust(32, b"\0"), bytes(16)), None).encryptor()
    return stream.update(bytes(size))


def expect(files: Sequence[bytes], requests: int, seed: int) -> tuple[int, int, str]:
    """What a client is to get: requests, bytes, and the SHA-256 of all answers in a row."""
    choice, everything, octets = random.Random(seed), hashlib.sha256(), 0
    for _ in range(requests):
        body = files[choice.randrange(len(files))]
        everything.update(body)
        octets += len(body)
    return requests, octets, everything.hexdigest()


def parse_load(guest: str, text: str) -> Load:
    """What a client told in the end."""
    told = dict(line.split(" ", 1) for line in text.splitlines())
    return Load(
        guest,
        told["process"],
        requests=int(told["requests"]),
        wrong=int(told["wrong"]),
        broken=int(told["broken"]),
        connections=int(told["connections"]),
        bytes=int(told["bytes"]),
        sha256=told["sha256"],
        latency_ms=tuple(map(float, told["latency"].split(","))),
    )


@define
class Web:
    """The guests at their work."""

    shells: Mapping[str, GuestShell]
    requests: int

    @property
    def clients(self) -> list[str]:
        """The guests that ask."""
        return [name for name in self.shells if name != "server"]

    @property
    def logs(self) -> str:
        """The command that prints what the programs said last."""
        return LOGS

    async def start(self) -> None:
        """Make the files and start all programs."""
        make = "\n".join(MAKE_FILE.format(key=key, size=size) for key, size in enumerate(SIZES))
        await self.shells["server"].run(f"{make}\n{SERVE}")
        await together(partial(self._load, name, seed, self.requests) for seed, name in enumerate(self.clients))

    async def _load(self, name: str, seed: int, requests: int) -> None:
        digests = [hashlib.sha256(file_bytes(key, size)).hexdigest() for key, size in enumerate(SIZES)]
        client = b64encode(CLIENT).decode()
        await self.shells[name].run(
            LOAD.format(
                client=client,
                server=SERVER,
                requests=requests,
                rate=PER_SECOND,
                seed=seed,
                digests=" ".join(digests),
            )
        )

    async def progress(self) -> dict[str, float]:
        """The share of its requests that each client has made."""
        found = await together(partial(self.shells[name].run, "cat /run/progress") for name in self.clients)
        return {name: int(done) / self.requests for name, done in zip(self.clients, found, strict=True)}

    async def outcome(self) -> Outcome:
        """What each client got."""
        files = [file_bytes(key, size) for key, size in enumerate(SIZES)]
        told = await together(partial(self.shells[name].run, DESCRIBE) for name in self.clients)
        return Outcome(
            tuple(parse_load(name, text) for name, text in zip(self.clients, told, strict=True)),
            {name: expect(files, self.requests, seed) for seed, name in enumerate(self.clients)},
        )

    async def spoil(self) -> None:
        """For the negative control: a byte of a file is changed, and the server is killed, while a client asks anew."""
        client, server = self.clients[0], self.shells["server"]
        await server.run(SPOIL_FILE.format(key=len(SIZES) - 1))
        await self._load(client, 0, SPOILED)
        await server.run(KILL)
        await server.run(SERVE)


def make(shells: Mapping[str, GuestShell], short: bool) -> Web:
    """Server and clients of these guests."""
    return Web(shells, SHORT if short else WHOLE)


SCENARIO = Scenario(
    name="web",
    claim="A web server under load is saved, destroyed and restored with no wrong byte and no broken connection.",
    make=make,
    check=check,
    fewest_vms=2,
    short_vms=2,
)
