"""Run the jobs that are due in performance_db.

From cron, every minute; runs may overlap, they share the work, and cron mails only failures:

    * * * * *  cd /opt/perfserver && .venv/bin/python handler.py --once

Or for ever, from systemd: python handler.py --workers 4

The database is $PERFDB_DSN (or libpq's PG* variables), times are in $PERFDB_TIMEZONE (UTC).
Exit status: 0 all well, or nothing to do; 1 a job failed; 2 wrong usage; 3 no database or no tables.
SIGTERM or Ctrl-C: the running step is finished and the job handed back; a second one stops at once.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import random
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import psycopg

import control
import jobs
import schedules
from worker import Worker, end_overrun, recover, use_worker

log = logging.getLogger("handler")

# The job files. A new job type is one file and its name here (or --module NAME).
JOB_MODULES = ["alarm_calc", "baze_tag_delete", "baze_insert_alloc"]

OK, JOBS_FAILED, USAGE, NO_DATABASE = 0, 1, 2, 3  # exit status; 2 is argparse's

LOOK_AFTER_SECONDS = 1.0   # how often a worker looks for what dead workers left
RECONNECT_SECONDS = 5.0    # longest wait between two tries to reach a lost database
CONNECT_TRIES = 4          # at the start, and in --once also later


class Unavailable(Exception):
    """The database cannot be reached or lacks the tables; the text says what to do."""


class JobHandler:
    """Finds due jobs and runs them, one after the other, in this process.

    `types`: names of the job types to run, None: all that are known here. `limit`: at most so many
    jobs, None: no limit; a `multiprocessing.Value` shares one limit among processes.
    """

    def __init__(self, dsn: str | None = None, *, types: Sequence[str] | None = None, once: bool = False,
                 limit: Any = None, poll: float = 5.0, with_tests: bool = False) -> None:
        self.dsn = dsn
        self.types = list(jobs.JOB_TYPES if types is None else types)
        self.once = once
        self.limit = limit
        self.poll = poll
        self.with_tests = with_tests
        self.failed = 0  # jobs that ended Failed
        self.worker: Worker | None = None
        self.second_signal_kills = True
        self._signals = 0
        self._parent = os.getppid()
        self._introduced = False
        self._woken = False
        self._looked_after = float("-inf")
        self._wakeup, self._wakeup_end = os.pipe()  # a signal writes to it and so ends a wait

    # Starting and stopping.

    def run(self) -> int:
        """Run jobs until there are none left (`once`) or a signal comes; return the exit status."""
        os.set_blocking(self._wakeup_end, False)
        signal.set_wakeup_fd(self._wakeup_end, warn_on_full_buffer=False)
        try:
            self._start()
            self._loop()
        except ValueError as exc:
            log.error("%s", exc)
            return USAGE
        except Unavailable as exc:
            log.error("%s", exc)
            return NO_DATABASE
        except psycopg.Error as exc:
            log.error("the database refuses what the handler needs: %s", str(exc).strip())
            return NO_DATABASE
        finally:
            if self.worker:
                self.worker.close()
                use_worker(None)
            signal.set_wakeup_fd(-1)
            os.close(self._wakeup)
            os.close(self._wakeup_end)
        return JOBS_FAILED if self.failed else OK

    def _loop(self) -> None:
        setbacks = 0  # turns in a row that the database did not let us finish
        while not self.stopping():
            try:
                if not self._introduced:
                    self._introduce()
                if not self._turn():
                    return
                setbacks = 0
            except psycopg.OperationalError as exc:
                setbacks += 1
                if self.once and setbacks == CONNECT_TRIES:
                    raise Unavailable(f"the database failed {setbacks} times in a row: {exc}") from None
                self._reconnect(exc)

    def stopping(self) -> bool:
        """Whether to stop before the next step: a signal came, or the parent process is gone."""
        return bool(self._signals) or os.getppid() != self._parent

    def stop(self, signum: int, _frame: Any) -> None:
        self._signals += 1
        if self._signals > 1 and self.second_signal_kills:
            os._exit(128 + signum)  # the connection dies with us, and the job is found at once

    def _start(self) -> None:
        """Connect and take an id."""
        self.worker = self._try(lambda: Worker(self.dsn), CONNECT_TRIES)
        self.worker.stopping = self.stopping
        self.worker.begin_at_once = True
        use_worker(self.worker)

    def _introduce(self) -> None:
        """Say on a new connection which types we know, and listen for new jobs."""
        control.write_types(self.worker.connection, self.types)
        if not self.once:
            self.worker.connection.add_notify_handler(self._wake)
            self.worker.connection.execute("LISTEN job_instances")
        self._introduced = True

    def _wake(self, _notify: Any) -> None:
        self._woken = True

    def _try(self, connect: Any, tries: int | None) -> Any:
        """Return what `connect` returns; back off and try again, `tries` times or for ever."""
        wait = 0.1
        for left in (iter(lambda: 1, 0) if tries is None else range(tries - 1, -1, -1)):
            try:
                return connect()
            except psycopg.errors.UndefinedTable:
                raise Unavailable("the tables are missing: run `python jobctl.py init`") from None
            except psycopg.OperationalError as exc:
                if not left or self.stopping():
                    raise Unavailable(f"cannot reach the database: {str(exc).strip()}\n"
                                      "  set PERFDB_DSN, give --dsn, or start the server") from None
            self._sleep(wait * random.uniform(0.5, 1))
            wait = min(2 * wait, RECONNECT_SECONDS)

    def _reconnect(self, exc: psycopg.Error) -> None:
        log.warning("worker=%d lost the database, trying again: %s", self.worker.id, str(exc).strip())
        self._sleep(random.uniform(0, 0.2))  # not all at once
        self._introduced = False
        self._try(self.worker.reconnect, CONNECT_TRIES if self.once else None)
        log.warning("worker=%d is back", self.worker.id)

    # Working.

    def _turn(self) -> bool:
        """Run one job, or wait for one; return False when there is no more to do."""
        self._look_after()
        if row := self.worker.claimed or self._claim():
            self._run_job(row)
        elif self.once or not self._left():
            return False
        else:
            self._wait()
        return True

    def _look_after(self) -> bool:
        """Recover what dead and hanging workers left, create what schedules owe; return whether there was any.

        At most once in LOOK_AFTER_SECONDS, however often it is called. It is also when plans that were
        made for smaller tables are given up.
        """
        now = time.monotonic()
        if now - self._looked_after < LOOK_AFTER_SECONDS:
            return False
        if self._looked_after > 0:  # at the start there are no plans yet
            self.worker.forget_plans()
        self._looked_after = now
        end_overrun(self.worker)
        recovered = recover(self.worker)
        return bool(schedules.create_due_jobs(self.worker.connection) or recovered)

    def _claim(self) -> dict[str, Any] | None:
        self._woken = False  # whoever wakes us from here on deserves another look
        if not self._reserve():
            return None
        self.worker.claimed = self.worker.claim(self.types, self.with_tests)
        if self.worker.claimed is None and self.limit is not None:
            with self.limit.get_lock():
                self.limit.value += 1
        return self.worker.claimed

    def _left(self) -> bool:
        """Whether the limit allows another job."""
        return self.limit is None or self.limit.value > 0

    def _reserve(self) -> bool:
        if self.limit is None:
            return True
        with self.limit.get_lock():
            self.limit.value -= (allowed := self.limit.value > 0)
        return allowed

    def _run_job(self, row: dict[str, Any]) -> None:
        """Run a claimed job to its end, whatever becomes of it; a lost connection is raised."""
        started = time.monotonic()
        # With a limit the next job is claimed on its own, after a look at the limit.
        self.worker.claim_at_end = (self.worker.claim_params(self.types, self.with_tests)
                                    if self.limit is None else None)
        try:
            job = jobs.JOB_TYPES[row["job_type"]](row["id"], skip_test=not self.with_tests)
            self.worker.claimed = None
            failed_steps = job.run()
        except jobs.JobTakenOver as exc:
            log.warning("job=%d dropped: %s", row["id"], exc)
        except Exception as exc:
            if self.worker.connection.closed:
                raise
            if self.worker.claimed is row:  # the class failed before it looked at the job
                self.worker.claimed = None
            jobs.refuse(self.worker, row["id"], exc)  # unless that has been done
            self.failed += 1
        else:
            self.failed += job.state == "Failed"
            log.log(logging.ERROR if job.state == "Failed" else logging.INFO,
                    "job=%d type=%r state=%s steps=%d failed=%d seconds=%.3f", job.job_id, job.name,
                    job.state, len(job.job_step_ids or []), len(failed_steps), time.monotonic() - started)

    def _wait(self) -> None:
        """Sleep until there may be work: a NOTIFY, an orphan, a signal, or `poll` seconds."""
        until = time.monotonic() + self.poll
        while not (self._woken or self.stopping() or (left := until - time.monotonic()) <= 0):
            if self._sleep(min(left, LOOK_AFTER_SECONDS), self.worker.connection.fileno()):
                return  # a NOTIFY, or the end of the connection: the next statement will tell
            if self._look_after():
                return

    def _sleep(self, seconds: float, *files: int) -> bool:
        """Sleep for `seconds`, less if a signal comes or one of `files` can be read: then True."""
        ready, _, _ = select.select([self._wakeup, *files], [], [], seconds)
        if self._wakeup in ready:
            os.read(self._wakeup, 512)
        return any(file in ready for file in files)


class Pool:
    """Worker processes, each a JobHandler of its own; one that dies is replaced."""

    def __init__(self, count: int, make_handler: Callable[[], JobHandler], once: bool) -> None:
        self.count = count
        self.make_handler = make_handler
        self.once = once
        self.pids: set[int] = set()
        self._signals = 0

    def run(self) -> int:
        """Run until all workers have ended; return the gravest of their exit statuses."""
        for signum in (signal.SIGTERM, signal.SIGINT):
            signal.signal(signum, self.stop)
        for _ in range(self.count):
            self._fork()
        statuses = {OK}
        while self.pids:
            pid, status = os.wait()
            self.pids.discard(pid)
            if (code := os.waitstatus_to_exitcode(status)) >= 0:
                statuses.add(code)
            if not self._signals and (code < 0 or (not self.once and code != OK)):
                log.warning("worker process %d ended with %d and is replaced", pid, code)
                time.sleep(0 if code < 0 and self.once else 0.2)  # not in a tight loop
                self._fork()
        return max(statuses)

    def _fork(self) -> None:
        """Start a worker; it leaves by os._exit and never returns here."""
        if pid := os.fork():
            self.pids.add(pid)
            return
        status = NO_DATABASE
        try:
            status = run_here(self.make_handler(), second_signal_kills=False)
        except BaseException:
            log.exception("worker process %d failed", os.getpid())
        finally:
            logging.shutdown()
            os._exit(status)

    def stop(self, _signum: int, _frame: Any) -> None:
        """Pass the first signal on; a second one kills, and the jobs are found by whoever looks next."""
        self._signals += 1
        for pid in self.pids:
            os.kill(pid, signal.SIGTERM if self._signals == 1 else signal.SIGKILL)


def run_here(handler: JobHandler, second_signal_kills: bool = True) -> int:
    """Run `handler` in this process, stopped by SIGTERM and SIGINT.

    In a pool a signal may come twice, from the pool and from the terminal or systemd: there the pool
    alone decides what is a second one.
    """
    handler.second_signal_kills = second_signal_kills
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, handler.stop)
    return handler.run()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--once", action="store_true", help="run everything due, then exit (for cron)")
    parser.add_argument("--workers", type=positive, default=1, metavar="N",
                        help="worker processes, one connection each (default 1: this process itself)")
    parser.add_argument("--type", action="append", metavar="NAME",
                        help="run only jobs of this type; may be given again (default: all known)")
    parser.add_argument("--limit", type=positive, metavar="N", help="run at most N jobs, then exit")
    parser.add_argument("--poll", type=seconds, default=5.0, metavar="SECONDS",
                        help="look for jobs at least so often, in case a NOTIFY is missed (default 5)")
    parser.add_argument("--module", action="append", default=[], metavar="NAME",
                        help="also load the job file NAME.py; may be given again")
    parser.add_argument("--with-tests", action="store_true",
                        help='also run jobs with "test" in their description')
    parser.add_argument("--dsn", help="where performance_db is (default: $PERFDB_DSN, else the PG* variables)")
    parser.add_argument("-v", "--verbose", action="count", default=0,
                        help="log each job; twice: each step too")
    args = parser.parse_args(argv)
    try:
        load_modules([*JOB_MODULES, *args.module])
    except ImportError as exc:
        parser.error(f"--module: {exc}; give the name of a .py file beside handler.py or on PYTHONPATH")
    if unknown := set(args.type or ()) - set(jobs.JOB_TYPES):
        parser.error(f"--type: unknown {', '.join(map(repr, sorted(unknown)))}; "
                     f"known: {', '.join(map(repr, jobs.JOB_TYPES))}")
    return args


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return value


def load_modules(names: Sequence[str]) -> None:
    """Import the job files, which registers their job types."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    for name in names:
        importlib.import_module(name)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    logging.basicConfig(
        level=[logging.WARNING, logging.INFO, logging.DEBUG][min(args.verbose, 2)],
        format="%(asctime)s %(levelname)s pid=%(process)d %(message)s")
    limit = None
    if args.limit:
        import multiprocessing
        limit = multiprocessing.Value("l", args.limit)

    def make_handler() -> JobHandler:
        return JobHandler(args.dsn, types=args.type, once=args.once, limit=limit,
                          poll=args.poll, with_tests=args.with_tests)

    if args.workers == 1:
        return run_here(make_handler())
    return Pool(args.workers, make_handler, args.once).run()


if __name__ == "__main__":
    raise SystemExit(main())
