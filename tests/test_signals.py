"""A pool is told to stop at every moment between two of its lines; it awaits its own children."""

import os
import signal
import subprocess
import sys

import pytest
import sample_jobs  # noqa: F401  registers its types
from conftest import ROOT, TESTS
from helpers import wait_for

import control

POOL = ["--workers", "2", "--module", "signal_moments", "--module", "sample_jobs",
        "--poll", "1000"]


@pytest.fixture
def workers(conn):
    return lambda: [row["pid"] for row in
                    conn.execute("SELECT pid FROM job_workers ORDER BY started")]


@pytest.mark.parametrize("moment", [
    "before fork 1", "before fork 2", "after fork 1", "after fork 2", "in child 1", "in child 2"])
def test_a_pool_stops_whenever_it_is_told(start_handler, workers, moment):
    process = start_handler(*POOL, env={"MOMENT": moment})
    if moment.startswith("in child"):  # one worker was told: it ends, well, and the other goes on
        wait_for(lambda: len(workers()) == 1 == len(children(process.pid)))
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=15) == 0


def test_a_pool_told_to_stop_while_it_replaces_a_worker_starts_none(start_handler, workers):
    process = start_handler(*POOL, env={"MOMENT": "before a replacement"})
    wait_for(lambda: len(workers()) == 2)
    os.kill(workers()[0], signal.SIGKILL)
    assert process.wait(timeout=15) == 0
    assert process.log.read_text().count("is replaced") == 1


def test_a_pool_does_not_take_strangers_for_its_workers(start_handler, workers, conn):
    process = start_handler(*POOL, env={"MOMENT": "adopts strangers"})
    wait_for(lambda: len(workers()) == 2)
    before = workers()
    control.write_types(conn, ["Orphans"])
    control.create_job(conn, "Orphans", {})
    wait_for(lambda: conn.execute(
        "SELECT 1 FROM job_instances WHERE state = 'Finished'").fetchone())
    wait_for(lambda: len(children(process.pid)) == 2,
             what="the pool to have seen the stranger end")
    assert workers() == before
    assert "is replaced" not in process.log.read_text()
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=15) == 0


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return file.read().split()


@pytest.mark.parametrize("args", [[], ["--workers", "2"]])
def test_a_clean_stop_is_status_0_though_a_job_had_failed(start_handler, conn, args):
    control.write_types(conn, ["Scripted"])
    control.create_job(conn, "Scripted", {"steps": ["error"]})
    process = start_handler(*args, "--module", "sample_jobs")
    wait_for(lambda: conn.execute("SELECT 1 FROM job_instances WHERE state = 'Failed'").fetchone())
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=15) == 0


def test_a_handler_outlives_the_shell_that_started_it(dsn, conn, workers, tmp_path):
    control.write_types(conn, ["Noop"])
    command = (f"nohup {sys.executable} {ROOT / 'handler.py'} --module sample_jobs --poll 1000 "
               "> log 2>&1 & echo $!")
    pid = int(subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True,
                             timeout=20, env=os.environ | {"PYTHONPATH": str(TESTS)},
                             cwd=tmp_path).stdout)
    try:
        wait_for(lambda: workers() == [pid])
        control.create_job(conn, "Noop", {})
        wait_for(lambda: conn.execute(
            "SELECT 1 FROM job_instances WHERE state = 'Finished'").fetchone())
    finally:
        os.kill(pid, signal.SIGTERM)
    wait_for(lambda: workers() == [])


def test_what_became_of_a_worker_that_was_replaced_is_no_status(start_handler, conn, workers):
    process = start_handler(*POOL)
    wait_for(lambda: len(workers()) == 2)
    conn.execute("ALTER TABLE job_workers RENAME TO away")
    conn.execute("SELECT pg_terminate_backend(backend_pid) FROM away")
    wait_for(lambda: "ended with 3 and is replaced" in process.log.read_text())
    conn.execute("ALTER TABLE away RENAME TO job_workers")
    wait_for(lambda: conn.execute(
        "SELECT count(*) = 2 AS both "
        "FROM job_workers w JOIN pg_stat_activity a ON a.pid = w.backend_pid"
        ).fetchone()["both"])
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=15) == 0
