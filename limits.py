"""How long a step may take: an alarm clock, and an end for the processes the step has started."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

STOPS = (signal.SIGTERM, signal.SIGINT)  # a job may handle them, for its time
BOOT_CLOCK = getattr(time, "CLOCK_BOOTTIME", None)  # Linux


class StepTimeout(KeyboardInterrupt):
    """The step has run for as long as it may.

    A KeyboardInterrupt, because psycopg cancels the running query on that one, and because
    `except Exception` in a step must not swallow it.
    """


def is_interrupt(exc: BaseException) -> bool:
    """Whether this is Ctrl-C of somebody who runs a job without a handler: not the job's doing."""
    return (isinstance(exc, KeyboardInterrupt) and not isinstance(exc, StepTimeout)
            and signal.getsignal(signal.SIGINT) is signal.default_int_handler)


@contextlib.contextmanager
def time_limit(limit: timedelta) -> Iterator[None]:
    """Raise `StepTimeout` in the block once `limit` is over, in a query, a socket or plain Python.

    Processes that were started in the block end with it then; one that it has forked and that
    comes back here ends: it must not go on as the worker. Signals reach the main thread only: in
    another one there is no limit, and what hangs there is ended by a neighbour (worker.py).
    """
    pid, own_signals = os.getpid(), contextlib.nullcontext()
    if threading.current_thread() is threading.main_thread():
        own_signals = _alarm(limit)
    try:
        with own_signals:
            yield
    finally:
        if os.getpid() != pid:
            _leave_child(sys.exc_info()[1])


def _leave_child(exc: BaseException | None) -> NoReturn:
    """End a forked process as Python would, but for what the worker does at its end."""
    if isinstance(exc, SystemExit):
        os._exit(exc.code & 255 if isinstance(exc.code, int) else exc.code is not None)
    if exc:
        traceback.print_exception(exc)
    os._exit(exc is not None)


@contextlib.contextmanager
def _alarm(limit: timedelta) -> Iterator[None]:
    """Raise `StepTimeout` in the block once `limit` is over; undo what it does to signals."""
    begun = time.clock_gettime(BOOT_CLOCK) if BOOT_CLOCK is not None else 0.0
    seconds = min(limit.total_seconds(), 1e8)
    end = time.monotonic() + seconds

    def ring(*_: Any) -> None:
        if (left := end - time.monotonic()) > 0:  # somebody else's alarm
            signal.setitimer(signal.ITIMER_REAL, left)
            return
        for pid in descendants(os.getpid(), begun):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        raise StepTimeout(
            f"Timed out: longer than the step limit of {limit} (job_types.step_timeout)")

    stops = {signum: signal.getsignal(signum) for signum in STOPS}
    before = signal.signal(signal.SIGALRM, ring)
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before or signal.SIG_DFL)  # None: not installed by Python
        for signum, handler in stops.items():
            if handler is not None and signal.getsignal(signum) is not handler:
                signal.signal(signum, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


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
