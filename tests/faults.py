"""The faults of make chaos: each gets handlers and running jobs, and does its damage."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import psycopg
from helpers import wait_for
from proxy import Proxy
from psycopg.conninfo import make_conninfo
from standby import Standby

import limits

if TYPE_CHECKING:
    from chaos import Chaos


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong, and how long it may be felt: 10 s, for most far less."""

    name: str
    inject: Callable[[Chaos], None]
    longest_seconds: float = 10.0


# ---------------------------------------------------------------------------- workers and handlers


def kill_worker(chaos: Chaos) -> None:
    for _ in range(6):
        job_id, _, pid, _ = chaos.running()
        chaos.inject(partial(os.kill, pid, signal.SIGKILL), job_id)


def kill_handler(chaos: Chaos) -> None:
    for _ in range(3):
        job_id, *_ = chaos.running()

        def fault() -> None:
            victim = chaos.handlers.pop(0)
            victim.kill()
            victim.wait()
            chaos.start("--workers", "2")
        chaos.inject(fault, job_id)


def stop_worker(chaos: Chaos) -> None:
    for _ in range(3):
        job_id, _, pid, backend_pid = chaos.running()
        os.kill(pid, signal.SIGSTOP)
        chaos.inject(partial(
            chaos.rows, f"SELECT pg_terminate_backend({backend_pid}, 5000)"), job_id)
        os.kill(pid, signal.SIGCONT)


def end_session(chaos: Chaos) -> None:
    for _ in range(6):
        job_id, *_, pid = chaos.running()
        chaos.inject(partial(chaos.rows, f"SELECT pg_terminate_backend({pid})"), job_id)


def take_over(chaos: Chaos) -> None:
    for _ in range(6):
        job_id, *_ = chaos.running()
        chaos.inject(partial(
            chaos.rows, f"UPDATE job_instances SET worker_id = NULL WHERE id = {job_id}"), job_id)


def start_twenty(chaos: Chaos) -> None:
    for _ in range(20):
        chaos.start("--once")
    chaos.injected += 20


WAITING_SQL = "SELECT count(*) FROM job_instances WHERE state IN ('Created', 'Queued')"
LAST_STEP_SQL = """
SELECT COALESCE(extract(epoch FROM max(finished)), 0)::float8
  FROM job_steps
"""


def stop_pools(chaos: Chaos) -> None:
    """Tell pools to stop while they start, work, or replace a worker."""
    chaos.end_handlers()
    for number in range(40):
        if chaos.rows(WAITING_SQL)[0][0] < 6:
            chaos.ask(4, seconds=0.3)
        pool = chaos.start("--workers", "4")
        first, *_ = wait_for(partial(limits.descendants, pool.pid, 0), what="its first worker")
        time.sleep(1.5 * random.random() ** 2)  # every fourth within 0.1 s
        if number % 4 == 0:
            os.kill(first, signal.SIGKILL)
            time.sleep(0.3 * random.random())
        stop_pool(chaos, pool)
    chaos.start("--workers", "4")


def stop_pool(chaos: Chaos, pool: subprocess.Popen) -> None:
    """Tell a pool to stop; note how long after the end of the last step it did."""
    pool.terminate()
    told = time.time()
    wait_for(lambda: pool.poll() is not None, what="a pool to stop")
    stopped = time.time()
    chaos.note(stopped - max(told, chaos.rows(LAST_STEP_SQL)[0][0]))
    chaos.check(pool.returncode == 0, f"a pool told to stop ended with {pool.returncode}")
    chaos.handlers.remove(pool)


# ------------------------------------------------------------------------------------- connections


def start_behind(chaos: Chaos, proxy: Proxy, options: str = "") -> int:
    """Start a worker behind `proxy`, wait until it has a running step, and return its job."""
    worker = chaos.start(dsn=f"{proxy.dsn} {options}")
    return chaos.running(worker.pid)[0]


def cut_half_open(chaos: Chaos) -> None:
    """The server sees a worker vanish, the worker sees nothing."""
    for _ in range(2):
        proxy = chaos.stack.enter_context(Proxy(chaos.dsn))
        chaos.ask()  # so that there is one left for the worker that is only starting
        job_id = start_behind(chaos, proxy, "tcp_user_timeout=2000")
        chaos.inject(proxy.go_deaf, job_id)
        proxy.close()


def go_silent(chaos: Chaos) -> None:
    """Nobody sees anybody vanish, in a step and at its COMMIT: a neighbour ends the step."""
    chaos.rows("UPDATE job_types SET step_timeout = '3 s'")
    chaos.ask(12, seconds=0.5)
    in_step, at_commit = (chaos.stack.enter_context(Proxy(chaos.dsn)) for _ in "12")
    silenced = {start_behind(chaos, proxy): proxy for proxy in (in_step, at_commit)}
    before = {job_id: chaos.effects(job_id) for job_id in silenced}
    in_step.go_silent()
    at_commit.silent_at = b"COMMIT"
    begun = time.monotonic()
    for job_id, effects in before.items():
        chaos.go_on(effects, job_id, timeout=120)
        chaos.note(time.monotonic() - begun)
    for proxy in silenced.values():
        proxy.heal()
    wait_for(lambda: chaos.log.read_text().count("is back") == 2, what="the silenced to come back")


# -------------------------------------------------------------------------------------- the server


def restart_server(chaos: Chaos) -> None:
    for _ in range(3):
        job_id, *_ = chaos.running()
        chaos.inject(chaos.server.restart, job_id)


DONE_SQL = """
SELECT 'step', id FROM job_steps     WHERE state = 'Finished'
 UNION ALL
SELECT 'job',  id FROM job_instances WHERE state = 'Finished'
"""
UNFLUSHED_SQL = "SELECT (pg_current_wal_insert_lsn() - pg_current_wal_flush_lsn())::bigint"


def crash_server(chaos: Chaos) -> None:
    """At any moment, and commits that did not wait for the disk are forgotten."""
    chaos.rows("ALTER SYSTEM SET wal_writer_delay = '10s'")
    chaos.rows("SELECT pg_reload_conf()")
    unflushed = 0
    chaos.let_end()
    for _ in range(10):
        chaos.ask(200, "ok", steps=1)
        chaos.ask(1)
        time.sleep(0.5 * random.random())
        unflushed += chaos.rows(UNFLUSHED_SQL)[0][0]
        done = set(chaos.rows(DONE_SQL))
        chaos.inject(chaos.server.restart)
        forgotten = done.difference(chaos.rows(DONE_SQL))
        chaos.check(not forgotten, f"Finished no more: {forgotten}")
    chaos.check(unflushed > 0, "all had been on the disk each time: nothing could be forgotten")
    chaos.blame_nobody()


SESSIONS_SQL = "SELECT id, backend_pid FROM job_workers ORDER BY id"


def fail_over(chaos: Chaos) -> None:
    """To a standby that has not heard of the last 1.5 s: a worker, claims, requests, effects."""
    for _ in range(2):
        chaos.end_handlers()
        primary, standby = chaos.server, chaos.stack.enter_context(Standby(chaos.server))
        both = make_conninfo(primary.dsn(), host=f"{primary.directory},{standby.directory}",
                             port="5432,5432", target_session_attrs="read-write")
        chaos.start_two(both)
        chaos.ask()
        _, _, sleeper, _ = chaos.running()
        standby.cut_off()
        chaos.ask(2)
        chaos.start(dsn=both)
        time.sleep(1.5)
        os.kill(sleeper, signal.SIGSTOP)
        primary.process.send_signal(signal.SIGQUIT)
        primary.process.wait()
        standby.promote()
        chaos.move(standby)
        chaos.inject(lambda: None)
        os.kill(sleeper, signal.SIGCONT)
    chaos.let_end()
    sessions = chaos.rows(SESSIONS_SQL)
    time.sleep(3)  # while nobody ends anybody
    chaos.check(chaos.rows(SESSIONS_SQL) == sessions, f"sessions do not last: {sessions}")
    failed = chaos.rows("SELECT id, comment FROM job_instances WHERE state = 'Failed'")
    chaos.check(not failed, f"blamed: {failed}")


TIMEOUTS = ("statement_timeout", "lock_timeout", "idle_in_transaction_session_timeout",
            "idle_session_timeout", "transaction_timeout")


def time_out(chaos: Chaos) -> None:
    """Timeouts of the database that are shorter than a step, and than a wait for jobs."""
    chaos.end_handlers()
    for (name,) in chaos.rows("SELECT name FROM pg_settings WHERE name = ANY(%(names)s)",
                              {"names": list(TIMEOUTS)}):
        chaos.rows(f"ALTER DATABASE postgres SET {name} = '20ms'")
        chaos.injected += 1
    chaos.start_two()
    chaos.let_end()
    time.sleep(0.5)  # idle
    chaos.ask()
    chaos.blame_nobody()
    chaos.check(not chaos.log.read_text(), "the handlers complain")


def fill_disk(chaos: Chaos) -> None:
    chaos.injected += chaos.ask(2, "disk full")


NO_SPACE_SQL = """
CREATE FUNCTION no_space() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE disk_full; END $$
"""
NO_SPACE_FOR = (["job_instances"], ["job_steps"], ["job_instances", "job_steps", "job_workers"])


def run_out_of_space(chaos: Chaos) -> None:
    """For three seconds nothing can be claimed, begun, ended or put back, no worker register."""
    chaos.rows(NO_SPACE_SQL)
    for names in NO_SPACE_FOR:
        chaos.ask()
        chaos.running()
        for name in names:
            chaos.rows(f"CREATE TRIGGER no_space BEFORE INSERT OR UPDATE ON {name} "
                       "FOR EACH STATEMENT EXECUTE FUNCTION no_space()")
        chaos.start()
        time.sleep(3)
        chaos.inject(partial(make_space, chaos, names))
    chaos.blame_nobody()


def make_space(chaos: Chaos, names: list[str]) -> None:
    for name in names:
        chaos.rows(f"DROP TRIGGER no_space ON {name}")


def hold_snapshot(chaos: Chaos) -> None:
    connection = chaos.stack.enter_context(psycopg.connect(chaos.dsn))
    connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    connection.execute("SELECT count(*) FROM job_steps")  # and is never ended
    chaos.injected += 1


FAULTS = (
    Fault("worker killed (SIGKILL)", kill_worker),
    Fault("handler killed (SIGKILL)", kill_handler),
    Fault("worker stopped, taken over, woken", stop_worker),
    Fault("session ended (pg_terminate_backend)", end_session),
    Fault("job taken away by hand", take_over),
    Fault("20 handlers in one second", start_twenty),
    Fault("pool told to stop, after its last step", stop_pools, 2.0),
    Fault("connection cut half open", cut_half_open),
    # A neighbour waits until a minute after the step's limit, and looks every 10 s.
    Fault("connection silent, step limit 3 s", go_silent, 85.0),
    Fault("PostgreSQL restarted (immediate)", restart_server),
    Fault("PostgreSQL crashed, commits forgotten", crash_server),
    Fault("standby promoted 1.5 s behind", fail_over),
    Fault("timeouts of 20 ms on the database", time_out),
    Fault("disk full in a step", fill_disk),
    Fault("no space for 3 s", run_out_of_space),
    Fault("old snapshot held open", hold_snapshot),
)
