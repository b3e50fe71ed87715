"""A job type whose steps do what no job file should: python handler.py --module nasty_jobs."""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time

import psycopg

from jobs import JobInstance, JobStepError

DEEDS = {}


def deed(do):
    """Name a deed by its function: `lock_lost` is "lock lost"."""
    DEEDS[do.__name__.replace("_", " ")] = do
    return do


class Nasty(JobInstance):
    """Each step does the deed of its name; so does `_create_steps`, if `first` names one."""

    _name = "Nasty"

    def _create_steps(self):
        if first := self.parameters.get("first"):
            return DEEDS[first](self)
        return [{"name": name} for name in self.parameters["steps"]]

    def _run_step(self, step_id):
        return DEEDS[self.step["name"]](self)


class NastyTransactional(Nasty):
    """As Nasty, each step in a transaction."""

    _name = "Nasty Transactional"
    _step_in_transaction = True


class OwnRun(Nasty):
    """Has a `run` of its own that forgets what it is to return, and fails afterwards."""

    _name = "Own Run"

    def run(self):
        super().run()
        if "fail" in self.parameters:
            raise RuntimeError("a bug after the end")


class Unspeakable(Exception):
    """Cannot say what it is."""

    def __str__(self):
        raise ValueError("no text")

    __repr__ = __str__


@deed
def nothing(job):
    return None


@deed
def counting(job):
    told = job.step["parameters"]
    told["count"] = told.get("count", 0) + 1
    return told


# What is raised.


@deed
def unspeakable(job):
    raise Unspeakable


@deed
def cancelled_task(job):
    raise asyncio.CancelledError


@deed
def interrupt(job):
    raise KeyboardInterrupt


@deed
def generator_exit(job):
    raise GeneratorExit


@deed
def wordless(job):
    raise JobStepError


@deed
def endless_text(job):
    raise JobStepError("x" * 3_000_000)


# What is answered.


@deed
def nul_in_a_key(job):
    return {"deep": [{"a\0b": 1}]}


@deed
def surrogate_in_a_key(job):
    return {"a\ud800b": 1}


@deed
def no_repr(job):
    return {"power": Unspeakable()}


@deed
def lists_in_lists(job):
    value = []
    for _ in range(40):
        value = [value, value]
    return {"value": value}


@deed
def nul_in_a_name(job):
    return [{}, {"name": "a\0b"}]


@deed
def long_key(job):
    return [{"x" * 1_000_000: 1}]


# What becomes of the connection.


@deed
def with_connection(job):
    with job.connection as connection:
        connection.execute("SELECT 1")
    return None if job.step else [{"name": "nothing"}]


@deed
def close(job):
    job.connection.close()


@deed
def begin(job):
    job.connection.execute("BEGIN")
    return None if job.step else [{"name": "nothing"}]


@deed
def autocommit_off(job):
    job.connection.autocommit = False
    job.connection.execute("SELECT 1")
    return [{"name": "nothing"}]


@deed
def half_read(job):
    job.rows = job.connection.cursor().stream("SELECT generate_series(1, 100000)")
    return {"first": next(job.rows)[0]}


@deed
def statement_of_a_thread(job):
    connection = job.connection

    def sleep():
        with contextlib.suppress(psycopg.Error):
            connection.execute("SELECT pg_sleep(3)")

    threading.Thread(target=sleep, daemon=True).start()
    time.sleep(0.2)


@deed
def rollback(job):
    job.connection.execute("ROLLBACK")


@deed
def failure_swallowed(job):
    with contextlib.suppress(psycopg.Error):
        job.connection.execute("SELECT 1 / 0")


@deed
def other_server_down(job):
    psycopg.connect("host=/nonexistent")


@deed
def too_slow(job):
    job.connection.execute("SET statement_timeout = '20ms'")
    job.connection.execute("SELECT pg_sleep(5)")


@deed
def read_only(job):
    job.connection.read_only = True


@deed
def serializable(job):
    job.connection.isolation_level = psycopg.IsolationLevel.SERIALIZABLE


@deed
def client_cursors(job):
    job.connection.cursor_factory = psycopg.ClientCursor


@deed
def session_locks_freed(job):
    job.connection.execute("SELECT pg_advisory_unlock_all()")


@deed
def session_of_job(job):
    names = "transaction_read_only", "transaction_isolation"
    told = {name: job.connection.execute(f"SHOW {name}").fetchone()[0] for name in names}
    return told | {"cursor": type(job.connection.cursor()).__name__}


# What becomes of the process.


@deed
def child_comes_back(job):
    if os.fork() == 0:
        return {"child": True}
    assert os.wait()[1] == 0
    return {"child": False}


@deed
def process_pool(job):
    with multiprocessing.get_context("fork").Pool(2) as pool:  # which ends them by SIGTERM
        return {"sum": sum(pool.map(abs, [-1, -2]))}


@deed
def child_exits(job):
    if os.fork() == 0:
        sys.exit(7)
    return {"status": os.waitstatus_to_exitcode(os.wait()[1])}


@deed
def thread_left(job):
    threading.Thread(target=time.sleep, args=[60]).start()


@deed
def deaf(job):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.set_wakeup_fd(-1)


@deed
def own_alarm(job):
    signal.setitimer(signal.ITIMER_REAL, 0.05)
    time.sleep(0.2)
    return {"left": signal.getitimer(signal.ITIMER_REAL)[0] > 0}


@deed
def stderr_closed(job):
    sys.stderr.close()
    raise JobStepError("no wind")
