"""ipyparallel: controller and client on the first guest, an engine on each other, and work in rounds (`rounds.py`)."""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from attrs import define

from scenarios.ipyparallel.rounds import REPEATED, STEPS
from scenarios.processes import MAKE_WATCHED, measure_job, read_workers, start_job
from scenarios.rounds import Outcome, check
from scenarios.scenario import Scenario
from testbed.shell import GuestShell, run_everywhere
from testbed.tasks import together

SCRIPT = b64encode(Path(__file__).with_name("rounds.py").read_bytes()).decode()
WHOLE, SHORT = 150, 15
ROUNDS = "/srv/rounds"  #: where a line is for each
START_S = 500.0  #: for what imports much, on a busy host
SECURITY = "/root/.ipython/profile_default/security"
CONTROL = f"""\
base64 -d <<<'{SCRIPT}' >/run/rounds.py
rm -f {SECURITY}/*.json
setsid ipcontroller --ip=10.1.0.1 --location=10.1.0.1 >/run/controller.log 2>&1 &
until [[ -s {SECURITY}/ipcontroller-client.json ]]; do sleep 0.2; done
cat {SECURITY}/ipcontroller-engine.json
"""
ENGINE = """\
cat >/run/engine.json <<'END'
{connection}
END
setsid /run/watched ipengine --file=/run/engine.json --timeout=120 >/run/engine.log 2>&1 &
"""
LOGS = "tail -n 20 /run/*.log; ss -tn | head -n 40; ps -ef | tail -n 20"
SPOIL = f"sed -i '$ y/0123456789/1234567890/' {ROUNDS}"


def expect(rounds: int, engines: int) -> str:
    """The line of the last round, computed here."""
    states, digest = [bytes([number]) for number in range(engines)], b""
    for _ in range(rounds):
        for number in range(engines):
            for _ in range(STEPS):
                states[number] = hashlib.sha256(states[number] + digest * REPEATED).digest()
        digest = hashlib.sha256(b"".join(states)).digest()
    return f"{rounds} {digest.hex()}"


@define
class Engines:
    """The guests at their work."""

    shells: Mapping[str, GuestShell]
    rounds: int

    @property
    def logs(self) -> str:
        """The command that prints what the programs said last."""
        return LOGS

    @property
    def client(self) -> GuestShell:
        """The guest that has the others work."""
        return self.shells["node-1"]

    async def start(self) -> None:
        """Start the controller, the engines and the client."""
        await run_everywhere(self.shells.values(), MAKE_WATCHED)
        connection = await self.client.run(CONTROL, limit_s=START_S)
        others = [shell for shell in self.shells.values() if shell is not self.client]
        await together(partial(shell.run, ENGINE.format(connection=connection)) for shell in others)
        await start_job(self.client, f"/run/watched python3 /run/rounds.py {self.rounds} {len(others)}", "/run")

    async def progress(self) -> dict[str, float]:
        """The share of the rounds that are done, at the guest that writes them down."""
        return {self.client.name: await measure_job(self.client, "^", ROUNDS, self.rounds)}

    async def outcome(self) -> Outcome:
        """What came of each round."""
        lines = (await self.client.run(f"cat {ROUNDS}")).splitlines()
        expected = expect(self.rounds, len(self.shells) - 1)
        return Outcome(self.rounds, tuple(lines), await read_workers(self.shells), expected)

    async def spoil(self) -> None:
        """For the negative control: change the last round."""
        await self.client.run(SPOIL)


def make(shells: Mapping[str, GuestShell], short: bool) -> Engines:
    """Client and engines of these guests."""
    return Engines(shells, SHORT if short else WHOLE)


SCENARIO = Scenario(
    name="ipyparallel",
    claim="Engines of ipyparallel that are saved in their work, destroyed and restored compute on, and right.",
    make=make,
    check=check,
    fewest_vms=2,
    short_vms=3,
)
