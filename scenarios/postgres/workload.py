"""A primary and its replica, and a client with pgbench and a log of its own (`client`, which runs there)."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from attrs import define, field

from scenarios.postgres.check import Database, Outcome, check, find_ranges
from scenarios.scenario import Scenario
from testbed.shell import GuestShell
from testbed.tasks import together

CLIENT = Path(__file__).with_name("client").read_bytes()
SERVERS = ("primary", "replica")
PRIMARY, REPLICA = "10.1.0.1", "10.1.0.2"
WHOLE, SHORT = 300, 80  #: commits of the client, and transactions of pgbench
PER_SECOND = 5  #: of each
LIMIT_S = 300.0

#: How the programs of a server are called. What is in PATH is Perl around them, and takes ten times as long.
SERVER = """\
bin=/usr/lib/postgresql/15/bin etc=/etc/postgresql/15/main data=/var/lib/postgresql/15/main
log=/var/run/postgresql/log; cd /
as_postgres() { setpriv --reuid=postgres --regid=postgres --init-groups "$@"; }
control() { as_postgres $bin/pg_ctl -D $data -l $log -o "-c config_file=$etc/postgresql.conf" -w "$@" >/dev/null; }
sql() { $bin/psql -qAtX -v ON_ERROR_STOP=1 -U postgres bench -c "$1"; }
"""
#: The package has made a cluster, and both guests have the same disk: it is a base backup of itself.
SERVE = """\
cat >$etc/conf.d/qsnap.conf <<'CONFIGURATION'
listen_addresses = '*'
ssl = off
jit = off
shared_buffers = 4MB
checkpoint_timeout = 30s
synchronous_standby_names = '*'
synchronous_commit = remote_apply
hot_standby_feedback = on
primary_conninfo = 'host={primary} user=postgres'
CONFIGURATION
echo "local all postgres trust
host all,replication postgres 10.1.0.0/24 trust" >$etc/pg_hba.conf
mkdir -p /var/run/postgresql && chown postgres /var/run/postgresql
as_postgres $bin/pg_checksums --enable --no-sync -D $data >/dev/null
"""
FOLLOW = "as_postgres touch $data/standby.signal\ncontrol start"
MAKE_TABLES = """\
control start
$bin/createdb -U postgres bench
sql 'CREATE EXTENSION amcheck; CREATE TABLE ledger (number integer PRIMARY KEY)'
$bin/pgbench -U postgres --initialize --init-steps=dtGp bench 2>/dev/null
"""
LOAD = """\
base64 -d <<<'{client}' >/run/client
setsid bash /run/client {primary} {replica} {commits} {commits} {rate} {pause_s} >/run/client.log 2>&1 &
echo $! >/run/client.pid
until [[ -e /run/progress ]]; do sleep 0.1; done
"""
#: What is told in lines that parse_database knows; any other line is a fault.
PROCESSES = """\
SELECT 'process', backend_type, pid || '@' || extract(epoch FROM backend_start) FROM pg_stat_activity
  WHERE application_name = 'client' OR backend_type IN ('startup', 'walsender', 'walreceiver');
"""
CATCH_UP = """\
DO $$ BEGIN FOR turn IN 1..100 LOOP
  EXIT WHEN NOT pg_is_in_recovery() OR pg_last_wal_replay_lsn() >= '{lsn}';
  PERFORM pg_sleep(0.1);
END LOOP; END $$;
"""
#: Of pgbench's history all but the times.
TABLES = {
    "ledger": "number",
    "pgbench_accounts": "aid, bid, abalance, filler",
    "pgbench_tellers": "tid, bid, tbalance, filler",
    "pgbench_branches": "bid, bbalance, filler",
    "pgbench_history": "tid, bid, aid, delta",
}
DIGEST = """\
SELECT 'rows', '{table}', encode(sha256(string_agg(({columns})::text, '' ORDER BY {columns})::bytea), 'hex')
  FROM {table};
"""
CONTENTS = """\
SELECT 'commit', number FROM ledger;
SELECT 'balances', (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers),
  (SELECT sum(bbalance) FROM pgbench_branches), (SELECT sum(delta) FROM pgbench_history);
"""
CORRUPTION = "SELECT 'checksums', coalesce(sum(checksum_failures), -1) FROM pg_stat_database;"
DESCRIBE = """\
exec 2>&1
$bin/psql -qAtX -U postgres bench <<'SQL'
{statements}SQL
$bin/pg_amcheck -U postgres --heapallindexed bench
sql "{corruption}"
"""
CLIENT_PROCESS = "echo $(</run/client.pid)@$(cut -d ' ' -f 22 /proc/$(</run/client.pid)/stat)"
ASK_CLIENT = """\
echo transactions $(sed -n 's|^number of transactions actually processed: \\([0-9]*\\)/.*|\\1|p' /run/client.log)
cat /run/result; sed 's/^/commit /' /run/acknowledged
"""
#: A row is deleted. A byte of a page on the replica's disk is another one, after the last checkpoint: or the WAL would
#: have the page anew.
SPOIL_ROW = "sql 'DELETE FROM ledger WHERE number = 7'; sql CHECKPOINT"
SPOIL_PAGE = """\
file=$data/$(sql "SELECT pg_relation_filepath('pgbench_accounts')")
control stop && printf x | dd of=$file bs=1 seek=$((8192 * 100 + 4000)) conv=notrunc status=none && control start
"""
LOGS = "tail -n 30 /run/client.log /var/run/postgresql/log 2>/dev/null; ss -tn | head -n 30"


def describe_server(lsn: str) -> str:
    """The command that has a server tell what it holds, when it has applied the WAL up to `lsn`."""
    digests = "".join(DIGEST.format(table=table, columns=columns) for table, columns in TABLES.items())
    statements = f"{CATCH_UP.format(lsn=lsn)}{PROCESSES}{CONTENTS}{digests}"
    return DESCRIBE.format(statements=statements, corruption=CORRUPTION)


def parse_database(server: str, text: str) -> Database:
    """What a server told, by DESCRIBE."""
    commits: list[int] = []
    rows: dict[str, str] = {}
    balances: tuple[int, ...] = ()
    checksum_failures = -1
    faults: list[str] = []
    for line in text.splitlines():
        match line.split("|"):
            case ["process", *_]:
                pass
            case ["commit", number]:
                commits.append(int(number))
            case ["rows", table, digest]:
                rows[table] = digest
            case ["balances", *sums]:
                balances = tuple(map(int, sums))
            case ["checksums", failures]:
                checksum_failures = int(failures)
            case _:
                faults.append(line)
    return Database(server, find_ranges(commits), rows, balances, checksum_failures, tuple(faults))


def parse_processes(server: str, text: str) -> Iterator[tuple[str, str]]:
    """The processes of a server that PROCESSES printed: what each is, and its number and start."""
    for line in text.splitlines():
        match line.split("|"):
            case ["process", kind, process]:
                yield f"{server} {kind}", process


@define
class Postgres:
    """The guests at their work."""

    shells: Mapping[str, GuestShell]
    commits: int
    begun: dict[str, str] = field(factory=dict)

    @property
    def logs(self) -> str:
        """The command that prints what the programs said last."""
        return LOGS

    async def start(self) -> None:
        """Start both servers, then what works on them."""
        await together(partial(self._serve, name, how) for name, how in (("primary", MAKE_TABLES), ("replica", FOLLOW)))
        load = LOAD.format(
            client=b64encode(CLIENT).decode(),
            primary=PRIMARY,
            replica=REPLICA,
            commits=self.commits,
            rate=PER_SECOND,
            pause_s=1 / PER_SECOND,
        )
        await self.shells["client"].run(load, limit_s=LIMIT_S)
        ask = f'{SERVER}sql "{PROCESSES}"'
        told = await together(partial(self.shells[name].run, ask, limit_s=LIMIT_S) for name in SERVERS)
        self.begun = await self._processes(told)

    async def _serve(self, name: str, how: str) -> None:
        await self.shells[name].run(f"set -e\n{SERVER}{SERVE.format(primary=PRIMARY)}{how}", limit_s=LIMIT_S)

    async def _processes(self, told: list[str]) -> dict[str, str]:
        found = dict(each for name, text in zip(SERVERS, told, strict=True) for each in parse_processes(name, text))
        return {**found, "client": await self.shells["client"].run(CLIENT_PROCESS)}

    async def progress(self) -> dict[str, float]:
        """The share of its commits that the client has made."""
        return {"client": int(await self.shells["client"].run("cat /run/progress")) / self.commits}

    async def outcome(self) -> Outcome:
        """What the servers hold, the replica when it has applied what the primary has written; and the client's log."""
        lsn = await self.shells["primary"].run(f"{SERVER}sql 'SELECT pg_current_wal_lsn()'")
        describe = SERVER + describe_server(lsn)
        told = await together(partial(self.shells[name].run, describe, limit_s=LIMIT_S) for name in SERVERS)
        lines = [line.split() for line in (await self.shells["client"].run(ASK_CLIENT)).splitlines()]
        said = {word: int(values[0]) if values else 0 for word, *values in lines if word != "commit"}
        return Outcome(
            tuple(parse_database(name, text) for name, text in zip(SERVERS, told, strict=True)),
            find_ranges(int(values[0]) for word, *values in lines if word == "commit"),
            self.commits,
            stale=said["stale"],
            broken=bool(said["broken"]),
            slowest_ms=said["slowest"],
            transactions=said["transactions"],
            expected=self.commits // 2 * 2,
            begun=self.begun,
            ended=await self._processes(told),
        )

    async def spoil(self) -> None:
        """For the negative control: a row is deleted, and a byte of a page of the replica is changed."""
        await self.shells["primary"].run(f"set -e\n{SERVER}{SPOIL_ROW}", limit_s=LIMIT_S)
        await self.shells["replica"].run(f"set -e\n{SERVER}{SPOIL_PAGE}", limit_s=LIMIT_S)


def make(shells: Mapping[str, GuestShell], short: bool) -> Postgres:
    """The work on these guests."""
    return Postgres(shells, SHORT if short else WHOLE)


SCENARIO = Scenario(
    name="postgres",
    claim="A PostgreSQL primary and its replica under load are saved, destroyed and restored: no commit is "
    "lost that was acknowledged, no connection breaks, and both are intact.",
    make=make,
    check=check,
    fewest_vms=3,
    short_vms=3,
)
