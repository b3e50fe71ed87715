"""make test: the whole suite as some runs of pytest side by side, each with a server of its own.

Most tests wait for processes and servers, so three at a time take half as long on two cores.
The files are dealt out by size, the largest first. With arguments there is one run, given them.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).parent
RUNS = 3


def main(argv: Sequence[str]) -> int:
    pytest = [sys.executable, "-m", "pytest", "-q"]
    if argv:
        return subprocess.run([*pytest, *argv], cwd=TESTS.parent, check=False).returncode
    with contextlib.ExitStack() as stack:
        logs = [stack.enter_context(tempfile.TemporaryFile("w+")) for _ in range(RUNS)]
        runs = [subprocess.Popen([*pytest, *map(str, files)], cwd=TESTS.parent, stdout=log,
                                 stderr=subprocess.STDOUT)
                for files, log in zip(dealt(), logs, strict=True)]
        for run, log in zip(runs, logs, strict=True):
            run.wait()
            log.seek(0)
            print(log.read(), end="", flush=True)
    return max(run.returncode for run in runs)


def dealt() -> list[list[Path]]:
    """Return the test files in `RUNS` parts of about the same size."""
    parts: list[list[Path]] = [[] for _ in range(RUNS)]
    sizes = [0] * RUNS
    for path in sorted(TESTS.glob("test_*.py"), key=lambda path: -path.stat().st_size):
        least = sizes.index(min(sizes))
        parts[least].append(path)
        sizes[least] += path.stat().st_size
    return parts


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
