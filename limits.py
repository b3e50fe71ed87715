"""How long a step may take: an alarm clock, and an end for the processes the step has started."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", None)  # Linux


class StepTimeout(KeyboardInterrupt):
    """The step has run for as long as it may.

    A KeyboardInterrupt, because psycopg cancels the running query on that one, and because
    `except Exception` in a step must not swallow it.
    """


@contextlib.contextmanager
def time_limit(limit: timedelta) -> Iterator[None]:
    """Raise `StepTimeout` in the block once `limit` is over, in a query, a socket or plain Python.

    Processes that were started in the block end with it then. Signals reach the main thread only:
    in another one there is no limit, and what hangs there is ended by a neighbour (worker.py).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    begun = time.clock_gettime(BOOT_CLOCK) if BOOT_CLOCK is not None else 0.0

    def ring(*_: Any) -> NoReturn:
        for pid in descendants(os.getpid(), begun):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        raise StepTimeout(
            f"Timed out: longer than the step limit of {limit} (job_types.step_timeout)")

    before = signal.signal(signal.SIGALRM, ring)
    try:
        signal.setitimer(signal.ITIMER_REAL, min(limit.total_seconds(), 1e8))
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def descendants(pid: int, since: float) -> list[int]:
    """Return what `pid` and its children have started since then; [] where there is no /proc.

    `since` is in seconds of the clock that counts from the host's boot, as /proc does.
    """
    children: dict[int, list[int]] = {}
    first_tick = int(since * os.sysconf("SC_CLK_TCK"))
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has just ended
            fields = stat.read_text().rpartition(")")[2].split()
            if int(fields[19]) >= first_tick:  # starttime, proc(5)
                children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, new = [], children.get(pid, [])
    while new:
        found += new
        new = [child for one in new for child in children.get(one, [])]
    return found
