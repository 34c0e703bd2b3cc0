"""SSH among the guests of a scenario: each may run commands on each, with a key that was made for them."""

from __future__ import annotations

from collections.abc import Mapping

from testbed.shell import GuestShell, run_everywhere

#: What programs are told to use. Neither end gives up on a connection that says nothing for long.
SSH = "ssh -q -i /run/key -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o TCPKeepAlive=no"
FIRST_S = 300.0  #: many guests that run a program for the first time share the processors
MAKE_KEY = "ssh-keygen -q -t ed25519 -N '' -f /run/new && cat /run/new"
SERVE = """\
umask 077 && cat >/run/key <<'KEY'
{key}
KEY
ssh-keygen -y -f /run/key >/run/authorized
mkdir -p /run/sshd
/usr/sbin/sshd -h /run/key -o AuthorizedKeysFile=/run/authorized -o StrictModes=no -o TCPKeepAlive=no
"""


async def serve_ssh(shells: Mapping[str, GuestShell]) -> None:
    """Start a server on each guest. All have one key: it lets a guest in, and is what each is known by."""
    key = await next(iter(shells.values())).run(MAKE_KEY)
    await run_everywhere(shells.values(), SERVE.format(key=key), limit_s=FIRST_S)
