"""Run a command with a lock on a file: with_lock.py FILE COMMAND ARG...; exit with its status."""

import fcntl
import subprocess
import sys

with open(sys.argv[1], "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    raise SystemExit(subprocess.run(sys.argv[2:], check=False).returncode)
