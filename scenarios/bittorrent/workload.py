"""A swarm: opentracker and Apache on one guest, seeds and clients that are aria2 and Transmission in turn."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import partial

from attrs import define
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20

from scenarios.bittorrent.check import Download, Outcome, check
from scenarios.scenario import Scenario
from testbed.shell import GuestShell
from testbed.tasks import together

PIECE_POWER = 18  #: pieces of 256 KiB
#: The size of the file, and how fast each client may fetch it, in KiB/s: so that there is a middle to be saved in.
WHOLE, SHORT = (64 << 20, 768), (16 << 20, 1024)
KEY = "716e6170"  #: of the cipher whose key stream is the file; OpenSSL fills it up with zeros
PATH = "/srv/file"
ARIA, TRANSMISSION = "aria2", "transmission"

MAKE_FILE = """\
mkdir -p /srv && openssl enc -chacha20 -K {key} -iv 00 -in /dev/zero 2>/dev/null | head -c {size} >/srv/file
"""
MAKE_TORRENT = """\
cd /srv && mktorrent -a http://{tracker}:6969/announce -l {power} -o file.torrent file >/dev/null
transmission-show file.torrent | sed -n 's/.*Hash: //p'; base64 -w0 file.torrent
"""
SERVE = """\
base64 -d <<<'{torrent}' >/var/www/html/file.torrent && mkdir -p /run/apache2 /srv
(. /etc/apache2/envvars && apache2 -k start) 2>/dev/null
echo {info_hash} >/run/whitelist
setsid opentracker -p 6969 -P 6969 -w /whitelist -d /run >/run/opentracker.log 2>&1 &
until curl -sf http://localhost/file.torrent >/dev/null; do sleep 0.1; done
"""
FETCH = """\
mkdir -p /srv && cd /srv
until curl -sf http://{tracker}/file.torrent -o file.torrent; do sleep 0.2; done
"""
#: Neither looks for peers anywhere but at the tracker, nor stops when all is there.
START = {
    ARIA: """\
setsid aria2c -d /srv --enable-dht=false --bt-enable-lpd=false --enable-peer-exchange=false --listen-port=6881 \\
  --seed-ratio=0 --check-integrity=true --file-allocation=none --bt-tracker-interval=5 --enable-rpc --disk-cache=0 \\
  --max-overall-download-limit={rate}K --summary-interval=0 /srv/file.torrent >/run/client.log 2>&1 &
echo $! >/run/client.pid
""",
    TRANSMISSION: """\
mkdir -p /run/transmission
cat >/run/transmission/settings.json <<'SETTINGS'
{{"download-dir": "/srv", "dht-enabled": false, "lpd-enabled": false, "pex-enabled": false, "utp-enabled": false,
 "port-forwarding-enabled": false, "rpc-authentication-required": false, "preallocation": 0, "cache-size-mb": 1,
 "speed-limit-down": {rate}, "speed-limit-down-enabled": true, "rename-partial-files": false, "encryption": 0}}
SETTINGS
setsid transmission-daemon -f -g /run/transmission -e /run/client.log >/dev/null 2>&1 &
echo $! >/run/client.pid
until transmission-remote -a /srv/file.torrent >/dev/null 2>&1; do sleep 0.2; done
""",
}
HAS_BYTES = {
    ARIA: """\
curl -s localhost:6800/jsonrpc \\
  -d '{"jsonrpc":"2.0","id":"","method":"aria2.tellActive","params":[["completedLength"]]}' \\
  | sed -n 's/.*"completedLength":"\\([0-9]*\\)".*/\\1/p'
""",
    TRANSMISSION: """\
id=$(curl -si localhost:9091/transmission/rpc | tr -d '\\r' | sed -n 's/^X-Transmission-Session-Id: //p')
curl -s localhost:9091/transmission/rpc -H "X-Transmission-Session-Id: $id" \\
  -d '{"method":"torrent-get","arguments":{"fields":["haveValid"]}}' | sed -n 's/.*"haveValid":\\([0-9]*\\).*/\\1/p'
""",
}
DESCRIBE = """\
pid=$(cat /run/client.pid); echo $pid:$(cut -d ' ' -f 22 /proc/$pid/stat)
stat -c %s /srv/file; sha256sum </srv/file | cut -c 1-64
"""
LOGS = "tail -n 20 /run/client.log /run/opentracker.log 2>/dev/null; ss -tn | head -n 30"


def digest_of_file(size: int) -> str:
    """The SHA-256 of what MAKE_FILE makes, computed here."""
    key = bytes.fromhex(KEY).ljust(32, b"\0")
    stream = Cipher(ChaCha20(key, bytes(16)), None).encryptor()
    return hashlib.sha256(stream.update(bytes(size))).hexdigest()


@define
class Swarm:
    """The guests at their work."""

    shells: Mapping[str, GuestShell]
    size: int
    rate_kib: int  #: a second, of each client
    programs: Mapping[str, str]  #: by guest

    @property
    def logs(self) -> str:
        """The command that prints what the programs said last."""
        return LOGS

    @property
    def seeds(self) -> list[str]:
        """The guests that have the file from the beginning."""
        return [name for name in self.programs if name.startswith("seed")]

    @property
    def clients(self) -> list[str]:
        """The guests that fetch it."""
        return [name for name in self.programs if name not in self.seeds]

    async def start(self) -> None:
        """Make the file and its .torrent, then start all programs."""
        await together(partial(self.shells[name].run, MAKE_FILE.format(key=KEY, size=self.size)) for name in self.seeds)
        made = await self.shells[self.seeds[0]].run(MAKE_TORRENT.format(tracker="10.1.0.1", power=PIECE_POWER))
        info_hash, torrent = made.split()
        await self.shells["tracker"].run(SERVE.format(torrent=torrent, info_hash=info_hash))
        await together(partial(self._start, name) for name in self.programs)

    async def _start(self, name: str) -> None:
        near = "10.2.0.1" if name in {"client-1", "seed-2", "client-3"} else "10.1.0.1"
        program = START[self.programs[name]].format(rate=self.rate_kib)
        await self.shells[name].run(FETCH.format(tracker=near) + program)

    async def progress(self) -> dict[str, float]:
        """The share of the file that each client has."""
        found = await together(partial(self.shells[name].run, HAS_BYTES[self.programs[name]]) for name in self.clients)
        return {name: int(has or 0) / self.size for name, has in zip(self.clients, found, strict=True)}

    async def outcome(self) -> Outcome:
        """Every file by its digest."""
        files = dict(
            zip(self.programs, await together(partial(self._file, name) for name in self.programs), strict=True)
        )
        return Outcome(
            digest_of_file(self.size),
            self.size,
            tuple(files[name] for name in self.seeds),
            tuple(files[name] for name in self.clients),
        )

    async def _file(self, name: str) -> Download:
        process, size, digest = (await self.shells[name].run(DESCRIBE, limit_s=180)).split()
        return Download(name, self.programs[name], process, int(size), digest)

    async def spoil(self) -> None:
        """For the negative control: change one byte of a download."""
        where = self.size // 2
        await self.shells[self.clients[-1]].run(
            f"byte=$(od -An -tu1 -j {where} -N 1 {PATH}) && printf \\\\x$(printf %02x $((byte ^ 1))) "
            f"| dd of={PATH} bs=1 seek={where} conv=notrunc status=none"
        )


def make(shells: Mapping[str, GuestShell], short: bool) -> Swarm:
    """The swarm of these guests. There is no Transmission in a short run: it lets peers have nothing for 10 s."""
    seeds = [name for name in shells if name.startswith("seed")]
    clients = [name for name in shells if name not in seeds]
    programs = (ARIA,) if short else (ARIA, TRANSMISSION)
    turns = [*enumerate(seeds), *enumerate(clients)]
    size, rate_kib = SHORT if short else WHOLE
    return Swarm(shells, size, rate_kib, {name: programs[turn % len(programs)] for turn, name in turns})


SCENARIO = Scenario(
    name="bittorrent",
    claim="A BitTorrent swarm that is saved in its middle, destroyed and restored finishes every download right.",
    make=make,
    check=check,
    fewest_vms=3,
    short_vms=3,
    epochs=False,
)
