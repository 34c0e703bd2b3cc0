"""python -m tests.fuzz [TARGET [SECONDS]]: look for inputs that a target fails on, for so long (default 20).

Without a target it is every one in turn, after a control: a planted defect must be found. Inputs that reached something
new are left in build/fuzz/TARGET; what failed is build/fuzz/TARGET-crash-... (or timeout, oom).
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
WORK = Path("build/fuzz")
SECONDS = 20
CONTROL_S = 120
#: A reader of this size holds about 80 MB, of which most is Python and numpy.
LIMITS = ("-rss_limit_mb=400", "-timeout=60", "-max_len=32768")


def fuzz(target: str, seconds: int, corpus: str) -> int:
    """Run one target; its exit status, which is not 0 if an input failed."""
    found = WORK / target
    found.mkdir(parents=True, exist_ok=True)
    options = (*LIMITS, f"-max_total_time={seconds}", f"-artifact_prefix={found}-")
    command = [sys.executable, "-m", "tests.fuzz.engine", target, *options, str(found), str(CORPUS / corpus)]
    print(f"fuzz: {target}, {seconds} s at most", flush=True)
    with (WORK / f"{target}.log").open("w") as log:
        return subprocess.run(command, stdout=log, stderr=subprocess.STDOUT).returncode


def finds_planted() -> bool:
    status = fuzz("planted", CONTROL_S, "stream")
    return status != 0 and "IndexError: planted" in (WORK / "planted.log").read_text(errors="replace")


def main() -> int:
    known = sorted(path.name for path in CORPUS.iterdir())
    targets, seconds = sys.argv[1:2], int(sys.argv[2]) if sys.argv[2:] else SECONDS
    if not set(targets) <= set(known):
        print(f"fuzz: the targets are {', '.join(known)}", file=sys.stderr)
        return 2
    if not targets and not finds_planted():
        print("fuzz: the planted defect was not found, so nothing else would be", file=sys.stderr)
        return 1
    failed = [target for target in targets or known if fuzz(target, seconds, target)]
    for target in failed:
        lines = (WORK / f"{target}.log").read_text(errors="replace").splitlines()
        print(f"fuzz: {target} failed", *lines[-60:], sep="\n", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
