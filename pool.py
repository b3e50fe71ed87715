"""A pool of worker processes: started, replaced, told to stop; no moment is deaf."""

from __future__ import annotations

import functools
import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn

from limits import STOPS

log = logging.getLogger("handler")

THREAD_SECONDS = 5.0  # at the end, for threads that jobs have left running
BROKEN = 3  # exit status of a worker process that an unforeseen error ended

@functools.cache  # once in a process
def let_children_end() -> None:
    """Have signals end what a job forks: `stop` would only note them, and its parent wait.

    A worker of ours is forked with them blocked, and takes them again.
    """
    os.register_at_fork(after_in_child=forget_signals)


def forget_signals() -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


def take_signals(stop: Callable[[int, Any], None]) -> None:
    """Have SIGTERM and SIGINT call `stop`, also those that have waited since before a fork.

    SIGCHLD, if whoever started us ignores it, would keep from us that children end, and how.
    """
    let_children_end()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for signum in STOPS:
        signal.signal(signum, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def leave(status: int) -> NoReturn:
    """End this process; Python would wait for threads that jobs have left, and without end."""
    if threading.active_count() > 1:
        ender = threading.Timer(THREAD_SECONDS, os._exit, [status])
        ender.daemon = True
        ender.start()
    raise SystemExit(status)


class Pool:
    """Worker processes; one that dies is replaced.

    `work` is what each does: it is given the pool's process id and returns an exit status. A
    signal may come twice to it, from the pool and from the terminal or systemd: the pool alone
    decides what is a second one.
    """

    def __init__(self, count: int, work: Callable[[int], int], once: bool) -> None:
        self.count = count
        self.work = work
        self.once = once
        self.pids: set[int] = set()
        self._signals = 0

    def run(self) -> int:
        """Run until all workers have ended; return the gravest of their exit statuses.

        Told to stop, a pool that runs for ever returns 0: what failed has been logged long ago.
        """
        take_signals(self.stop)
        for _ in range(self.count):
            self._start()
        statuses = {0}
        while self.pids:
            pid, status = os.wait()
            if pid not in self.pids:
                continue  # as process 1 of a container one inherits strangers
            self.pids.discard(pid)
            if (code := os.waitstatus_to_exitcode(status)) >= 0:
                statuses.add(code)
            if code < 0 or (not self.once and code):
                self._replace(pid, code)
        return 0 if self._signals and not self.once else max(statuses)

    def _replace(self, pid: int, code: int) -> None:
        if self._signals:
            return
        log.warning("worker process %d ended with %d and is replaced", pid, code)
        time.sleep(0 if code < 0 and self.once else 0.2)  # not in a tight loop
        self._start()

    def _start(self) -> None:
        """Start a worker process, unless we are to stop.

        Signals wait from before that look until the child is known here and can stop there, so
        none is lost between them.
        """
        signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
        if not self._signals:
            parent = os.getpid()
            if (pid := os.fork()) == 0:
                self._be_worker(parent)
            self.pids.add(pid)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)

    def _be_worker(self, parent: int) -> None:
        """Be a worker process: leave by os._exit and never return."""
        status = BROKEN
        try:
            status = self.work(parent)
        except BaseException:
            log.exception("worker process %d failed", os.getpid())
        finally:
            logging.shutdown()
            os._exit(status)

    def stop(self, _signum: int, _frame: Any) -> None:
        """Pass the first signal on; a second one kills, and whoever looks next finds the jobs."""
        self._signals += 1
        for pid in self.pids:
            os.kill(pid, signal.SIGTERM if self._signals == 1 else signal.SIGKILL)
