"""Run the jobs that are due in performance_db.

From cron, every minute; runs may overlap, they share the work, and cron mails only failures:

    * * * * *  cd /opt/perfserver && .venv/bin/python handler.py --once

Or for ever, from systemd: python handler.py --workers 4

The database is $PERFDB_DSN (or libpq's PG* variables), times are in $PERFDB_TIMEZONE (UTC).
Exit status: 0 all well, or nothing to do; 1 a job failed; 2 wrong usage; 3 no database or no
tables. SIGTERM or Ctrl-C: the running step is finished and the job handed back; a second one
stops at once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import random
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

import claims
import control
import jobs
import life
import perfdb
import schedules
import worker
from answers import said
from limits import is_interrupt
from option_values import positive, seconds
from pool import Pool, leave, take_signals

log = logging.getLogger("handler")

# The job files. A new job type is one file and its name here, in $PERFDB_MODULES (which survives
# an upgrade of these files), or after --module.
JOB_MODULES = ["alarm_calc", "baze_tag_delete", "baze_insert_alloc"]

OK, JOBS_FAILED, USAGE, NO_DATABASE = 0, 1, 2, 3  # exit status; 2 is argparse's

LOOK_SECONDS = 1.5           # how often a worker looks for what there is to do beside jobs ...
LOOKS_PER_SECOND = 20        # ... but all workers together not oftener than so
OVERRUN_SECONDS = 10.0       # how often it looks for workers that hang
LONGEST_WAIT_SECONDS = 30.0  # between two tries after the database failed us
TRIES = 6                    # --once: so often, which is some seconds, before it gives up
REPEAT_SECONDS = 300.0       # a line that says the same again is logged at most so often


class Unavailable(Exception):
    """The database cannot be reached or lacks what is needed; the text says what to do."""


# One look instead of four: nothing is written, so an idle worker uses no transaction id.
LOOK_SQL = f"""
WITH {worker.HELD_CTE}
SELECT {worker.ANY_DEAD}, {schedules.ANY_DUE},
       (SELECT count(*) FROM job_workers)
"""  # noqa: S608


class JobHandler(worker.Alone):
    """Finds due jobs and runs them, one after the other, in this process.

    `types`: names of the job types to run, None: all that are known here. `limit`: at most so many
    jobs, None: no limit; a `multiprocessing.Value` shares one limit among processes. `parent`: the
    process to stop with, None: none.
    """

    def __init__(self, dsn: str | None = None, *, types: Sequence[str] | None = None,
                 once: bool = False, limit: Any = None, poll: float = 5.0,
                 with_tests: bool = False, parent: int | None = None) -> None:
        self.dsn = dsn
        self.types = list(jobs.JOB_TYPES if types is None else types)
        self.claims = claims.Wanted.of(self.types, with_tests)
        self.once = once
        self.limit = limit
        self.poll = poll
        self.with_tests = with_tests
        self.parent = parent
        self.failed = 0  # jobs that ended Failed
        self.worker: worker.Worker | None = None
        self.second_signal_kills = parent is None
        self._signals = 0
        self._setbacks = 0  # turns in a row that the database did not let us finish
        self._refusals = 0  # tries in a row that a server which is there let nobody in
        self._blames = False  # whether the last of them may be the fault of what we have in hand
        self._said: dict[str, tuple[str, float]] = {}  # duty -> what was logged of it last, when
        self._known: psycopg.Connection | None = None  # the one that has been introduced
        self._woken = False
        self._look_at = self._overruns_at = 0.0
        self._wakeup, self._wakeup_end = os.pipe()  # a signal writes to it and so ends a wait

    # Directions to the worker.

    def stopping(self) -> bool:
        """Whether to stop before the next step: a signal came, or the parent process is gone."""
        return bool(self._signals) or (self.parent is not None and os.getppid() != self.parent)

    def wanted(self) -> claims.Wanted | None:
        """Which job to claim with the end of one; with a limit each is claimed on its own."""
        return None if self.stopping() or self.limit is not None else self.claims

    def stop(self, signum: int, _frame: Any) -> None:
        self._signals += 1
        if self._signals > 1 and self.second_signal_kills:
            os._exit(128 + signum)  # the connection dies with us, and the job is found at once

    # Starting and stopping.

    def run(self) -> int:
        """Run jobs until none are left (`once`) or a signal comes; return the exit status."""
        os.set_blocking(self._wakeup_end, False)
        signal.set_wakeup_fd(self._wakeup_end, warn_on_full_buffer=False)
        try:
            self._loop()
        except ValueError as exc:
            log.error("%s", exc)
            return USAGE
        except (Unavailable, perfdb.UnfitDatabase) as exc:
            log.error("%s", exc)
            return NO_DATABASE
        finally:
            if self.worker:
                self.worker.close()
                jobs.use_worker(None)
            signal.set_wakeup_fd(-1)
            os.close(self._wakeup)
            os.close(self._wakeup_end)
        return JOBS_FAILED if self.failed and (self.once or not self._signals) else OK

    def _loop(self) -> None:
        """One job after the other. Whatever the database does in between, it is tried again."""
        job = None  # claimed with the end of the last one
        while not self.stopping():
            try:
                self._be_there()
                self._look_after()
                if job := job or self._claim():
                    job = self._run_job(job)
                elif self.once or not self._left():
                    return
                else:
                    self._wait()
                self._setbacks = 0
            except psycopg.Error as exc:
                job = None  # it is put back with whatever else was in hand
                self._set_back(exc)
        if job:
            with contextlib.suppress(psycopg.Error, jobs.JobTakenOver):  # else an orphan soon
                life.release(self.worker, job)

    def _be_there(self) -> None:
        """See to it that we are connected, with nothing left in hand of it, and known."""
        if self.worker is None:
            self.worker = worker.Worker(self.dsn, self)
        elif self.worker.connection.closed:
            self.worker.reconnect()
            log.warning("worker=%d is back", self.worker.id)
        elif self._setbacks:
            worker.put_back(self.worker, blame=self._blames)
        if not self._introduced:
            self._introduce()

    @property
    def _introduced(self) -> bool:
        return self.worker is not None and self._known is self.worker.connection

    def _introduce(self) -> None:
        """Say on a new connection which types we know, and listen for new jobs."""
        self._housekeep("types", lambda: control.write_types(self.worker.connection, self.types))
        if not self.once:
            self.worker.connection.add_notify_handler(self._wake)
            self.worker.connection.execute("LISTEN job_instances")
        self._known = self.worker.connection

    def _wake(self, _notify: Any) -> None:
        self._woken = True

    def _set_back(self, exc: psycopg.Error) -> None:
        """Wait a while after an error of the database, the longer the more there were in a row."""
        self._setbacks += 1
        self._blames = not perfdb.is_passing(exc)
        if text := self._hopeless(exc):
            raise Unavailable(text) from None
        self._say("database", f"the database failed, trying again: {str(exc).strip()}")
        if self.worker and self._blames and self._setbacks > 2:
            # What we have in hand can be neither ended nor put back: leave it to recovery, which
            # goes on without it, and go on ourselves under another id.
            self.worker.connection.close()
            self.worker = None
        wait = min(0.2 * 2 ** (self._setbacks - 1), LONGEST_WAIT_SECONDS)
        self._sleep(random.uniform(wait / 2, wait))  # not all at once

    def _hopeless(self, exc: psycopg.Error) -> str:
        """Return why no further try can help, '' if one may."""
        text = str(exc).strip()
        if isinstance(exc, psycopg.errors.UndefinedTable):
            return "the tables are missing: run `python jobctl.py init`"
        if isinstance(exc, psycopg.errors.UndefinedColumn | psycopg.errors.UndefinedFunction):
            return (f"the tables are older than these files ({text.splitlines()[0]}): "
                    "run `python jobctl.py init`")
        if isinstance(exc, psycopg.errors.InsufficientPrivilege):
            return f"the database refuses what the handler needs: {text}"
        self._refusals = self._refusals + 1 if self.worker is None and refuses(self.dsn) else 0
        if (self._setbacks if self.once else self._refusals) < TRIES:
            return ""
        if self._blames:  # it was reached
            return f"the database refuses what the handler needs, {TRIES} tries: {text}"
        return (f"cannot reach the database, {TRIES} tries: {text}\n"
                "  set PERFDB_DSN, give --dsn, or start the server")

    # Working.

    def _claim(self) -> claims.Job | None:
        self._woken = False  # whoever wakes us from here on deserves another look
        if not self._reserve():
            return None
        job = claims.claim(self.worker, self.claims)
        if job is None and self.limit is not None:
            with self.limit.get_lock():
                self.limit.value += 1
        return job

    def _left(self) -> bool:
        """Whether the limit allows another job."""
        return self.limit is None or self.limit.value > 0

    def _reserve(self) -> bool:
        if self.limit is None:
            return True
        with self.limit.get_lock():
            self.limit.value -= (allowed := self.limit.value > 0)
        return allowed

    def _run_job(self, job: claims.Job) -> claims.Job | None:
        """Run a claimed job to its end, whatever becomes of it; return the next one if claimed.

        Raise `psycopg.Error` if it is to be put back because the database failed.
        """
        started = time.monotonic()
        try:
            # Claimed, so its description is all right.
            instance = jobs.take_up(self.worker, job, skip_test=False)
            failed_steps = instance.run()
        except jobs.JobTakenOver as exc:
            log.warning("job=%d dropped: %s", job.id, exc)
            worker.put_back(self.worker)  # if it is ours after all: a step was taken away by hand
            return None
        except BaseException as exc:
            if is_interrupt(exc):
                raise
            self._refuse(job, exc)
            return None
        self.failed += instance.state == "Failed"
        log.log(logging.ERROR if instance.state == "Failed" else logging.INFO,
                "job=%d type=%r state=%s steps=%d failed=%d seconds=%.3f", job.id, job.type_name,
                instance.state, len(instance.job_step_ids or []), len(failed_steps or []),
                time.monotonic() - started)
        return instance.next_job

    def _refuse(self, job: claims.Job, exc: BaseException) -> None:
        """Fail a job that could not be taken up or run, unless it was the database that failed."""
        if jobs.says_nothing_about_the_job(self.worker, exc):
            if self._put_off(job, exc):
                return
            raise exc if isinstance(exc, psycopg.Error) else psycopg.OperationalError(
                f"the connection was lost in job {job.id}: {exc}") from exc
        try:
            jobs.refuse(self.worker, job.id, exc)
            self.failed += 1
        except jobs.JobTakenOver as gone:
            log.warning("job=%d dropped: %s", job.id, gone)
            worker.put_back(self.worker, blame=False)  # what may have been claimed with its end

    def _put_off(self, job: claims.Job, exc: BaseException) -> bool:
        """Let others go first if taking `job` up fails again and again; return whether it does."""
        if self._setbacks < TRIES - 1 or self.worker.connection.closed:
            return False
        with contextlib.suppress(psycopg.Error, jobs.JobTakenOver):
            jobs.leave_no_transaction(self.worker)
            life.release(self.worker, job, perfdb.clean(
                f"Put off after {TRIES} tries: {said(exc)}", self.worker.connection))
            log.warning("job=%d is put off for a minute, %d tries: %s", job.id, TRIES, said(exc))
            return True
        return False

    # What is done beside jobs, and waiting.

    def _look_after(self) -> bool:
        """Do what dead and hanging workers and schedules leave; return whether there may be work.

        At most once in LOOK_SECONDS, however often it is called; the more workers there are, the
        seldomer each looks. What fails here fails alone: it is logged, and the jobs go on.
        """
        if (now := time.monotonic()) < self._look_at:
            return False
        self._look_at = now + LOOK_SECONDS
        look = self._housekeep("look", lambda: perfdb.query(self.worker.connection, LOOK_SQL)[0])
        dead, due, workers = look or (True, True, 1)
        self._look_at = now + max(LOOK_SECONDS, workers / LOOKS_PER_SECOND)
        if now >= self._overruns_at:
            self._overruns_at = now + OVERRUN_SECONDS
            dead = self._housekeep("overruns", lambda: worker.end_overrun(self.worker)) or dead
        recovered = (dead and self._housekeep(
            "recovery", lambda: worker.recover(self.worker))) or {}
        self.failed += list(recovered.values()).count("Failed")
        created = due and self._housekeep("schedules", lambda: schedules.create_due_jobs(
            self.worker.connection, failed=self._say_schedule))
        return bool(recovered or created)

    def _housekeep(self, duty: str, do: Callable[[], Any]) -> Any:
        """Return what `do` returns; None if the database refuses it, which is logged."""
        try:
            return do()
        except (psycopg.Error, ValueError) as exc:
            if self.worker.connection.closed:
                raise
            self._say(duty, f"{duty}: failed, the jobs go on: {str(exc).strip()}")
            return None

    def _say_schedule(self, schedule_id: int, exc: psycopg.Error) -> None:
        self._say(f"schedule {schedule_id}",
                  f"schedule={schedule_id} cannot create its jobs: {str(exc).strip()}")

    def _say(self, duty: str, text: str) -> None:
        """Log a warning when what is wrong has changed, else at most once in REPEAT_SECONDS."""
        gist, now = re.sub(r"\d+", "0", text), time.monotonic()
        last, at = self._said.get(duty, ("", 0.0))
        if gist != last or now - at > REPEAT_SECONDS:
            self._said[duty] = gist, now
            log.warning("%s", text)

    def _wait(self) -> None:
        """Sleep until there may be work: a NOTIFY, an orphan, a signal, or `poll` seconds."""
        signal.set_wakeup_fd(self._wakeup_end, warn_on_full_buffer=False)  # a job may have had it
        until = time.monotonic() + self.poll
        while not (self._woken or self.stopping()):
            now = time.monotonic()
            if now >= until:
                return
            if self._sleep(max(0.0, min(until, self._look_at) - now),
                           self.worker.connection.fileno()):
                return  # a NOTIFY, or the end of the connection: the next statement will tell
            if self._look_after():
                return

    def _sleep(self, seconds: float, *files: int) -> bool:
        """Sleep for `seconds`, less if a signal comes or one of `files` can be read: then True."""
        ready, _, _ = select.select([self._wakeup, *files], [], [], seconds)
        if self._wakeup in ready:
            os.read(self._wakeup, 512)
        return any(file in ready for file in files)


def refuses(dsn: str | None) -> bool:
    """Whether a server is there that takes connections, only not ours; not one that starts up."""
    conninfo = make_conninfo(dsn or os.environ.get("PERFDB_DSN") or "", connect_timeout=5)
    return psycopg.pq.PGconn.ping(conninfo.encode()) == psycopg.pq.Ping.OK


def run_here(handler: JobHandler) -> int:
    """Run `handler` in this process, stopped by SIGTERM and SIGINT."""
    take_signals(handler.stop)
    return handler.run()


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--once", action="store_true",
                        help="run everything due, then exit (for cron)")
    parser.add_argument("--workers", type=positive, default=1, metavar="N",
                        help="worker processes, one connection each "
                             "(default 1: this process itself)")
    parser.add_argument("--type", action="append", metavar="NAME",
                        help="run only jobs of this type; may be given again (default: all known)")
    parser.add_argument("--limit", type=positive, metavar="N",
                        help="run at most N jobs, then exit")
    parser.add_argument("--poll", type=seconds, default=5.0, metavar="SECONDS",
                        help="look for jobs at least so often, in case a NOTIFY is missed "
                             "(default 5)")
    parser.add_argument("--module", action="append", default=[], metavar="NAME",
                        help="also load the job file NAME.py; may be given again")
    parser.add_argument("--with-tests", action="store_true",
                        help='also run jobs with "test" in their description')
    parser.add_argument("--dsn",
                        help="where performance_db is (default: $PERFDB_DSN, else the PG* "
                             "variables)")
    parser.add_argument("-v", "--verbose", action="count", default=0,
                        help="log each job; twice: each step too")
    args = parser.parse_args(argv)
    try:
        load_modules(args.module)
    except ImportError as exc:
        parser.error(f"{exc}\n  --module and PERFDB_MODULES take names of .py files beside "
                     "handler.py or on PYTHONPATH")
    if unknown := set(args.type or ()) - set(jobs.JOB_TYPES):
        parser.error(f"--type: unknown {', '.join(map(repr, sorted(unknown)))}; "
                     f"known: {', '.join(map(repr, jobs.JOB_TYPES))}")
    return args


def load_modules(names: Sequence[str] = ()) -> None:
    """Import our job files, those of $PERFDB_MODULES and `names`, which registers their types.

    Raise `ImportError` naming the module that cannot be imported. One that registers no type is
    said to do so.
    """
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    given = re.split(r"[\s,]+", os.environ.get("PERFDB_MODULES", ""))
    for name in [*JOB_MODULES, *filter(None, given), *names]:
        try:
            module = importlib.import_module(name.removesuffix(".py"))
        except (Exception, SystemExit) as exc:
            raise ImportError(
                f"module {name!r} cannot be loaded: {type(exc).__name__}: {exc}") from exc
        if not any(job_type.__module__ == module.__name__ for job_type in jobs.JOB_TYPES.values()):
            log.warning("module %r registers no job type: a subclass of JobInstance needs a _name",
                        name)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    stream = logging.StreamHandler()
    stream.setFormatter(perfdb.LogFormatter(
        "%(asctime)s %(levelname)s pid=%(process)d %(message)s"))
    logging.raiseExceptions = False  # a job may have closed what we log to
    logging.basicConfig(handlers=[stream],
                        level=[logging.WARNING, logging.INFO, logging.DEBUG][min(args.verbose, 2)])
    limit = None
    if args.limit:
        import multiprocessing
        limit = multiprocessing.Value("l", args.limit)

    def make_handler(parent: int | None = None) -> JobHandler:
        return JobHandler(args.dsn, types=args.type, once=args.once, limit=limit,
                          poll=args.poll, with_tests=args.with_tests, parent=parent)

    if args.workers == 1:
        return run_here(make_handler())
    return Pool(args.workers, lambda parent: run_here(make_handler(parent)), args.once).run()


if __name__ == "__main__":
    leave(main())
