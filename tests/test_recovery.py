"""Nothing is lost: killed, stopped, cut-off workers, restarts of PostgreSQL, everybody at once."""

import contextlib
import os
import random
import signal
import threading
import time

import psycopg
import pytest
import sample_jobs  # noqa: F401  registers its types
from helpers import claim, wait_for
from proxy import Proxy

import control
import handler
import jobs
import perfdb
import worker
from worker import Worker, recover, use_worker

SAMPLES = ("--module", "sample_jobs")


@pytest.fixture
def ask(conn, dsn):
    control.write_types(conn, ["Scripted", "Transactional"])
    conn.execute("CREATE TABLE trace (job_id bigint, step_id bigint)")  # a row per effect

    def ask(*steps, type_name="Transactional", sleep=60):
        return control.create_job(conn, type_name, {"steps": list(steps), "sleep": sleep})
    return ask


@pytest.fixture
def rows(dsn):
    """Ask the database on a connection of its own: the server may have been restarted."""
    def rows(query):
        with perfdb.connect(dsn) as connection:
            return connection.execute(query).fetchall()
    return rows


@pytest.fixture
def states(rows):
    order = {"job_steps": "job_instance_id, position", "job_instances": "id"}
    return lambda table="job_steps": [
        state for (state,) in rows(f"SELECT state FROM {table} ORDER BY {order[table]}")]


@pytest.fixture
def is_running(states):
    return lambda n=0: states()[n:n + 1] == ["Running"]


def effects(rows):
    """Return (all, distinct) effects: more of the first is a doubled one."""
    return rows("SELECT count(*), count(DISTINCT step_id) FROM trace")[0]


def worker_pid(rows):
    return rows("SELECT w.pid FROM job_workers w JOIN job_instances j ON j.worker_id = w.id")[0][0]


def test_a_killed_workers_job_goes_on_at_the_next_run(start_handler, run_handler, ask, rows,
                                                      states, is_running):
    ask("ok", "sleep", "ok", sleep=0.5)
    handler = start_handler(*SAMPLES)
    wait_for(lambda: is_running(1))
    handler.kill()
    handler.wait()
    run_handler("--once", *SAMPLES)
    assert states("job_instances") == ["Finished"]
    assert rows("SELECT state, attempts FROM job_steps ORDER BY position") == [
        ("Finished", 1), ("Finished", 2), ("Finished", 1)]
    assert effects(rows) == (3, 3)
    assert rows("SELECT * FROM job_workers") == []  # the dead one's row is gone too


def test_an_idle_neighbour_takes_over_within_two_seconds(start_handler, ask, rows, is_running):
    ask("sleep", sleep=0.5)
    for _ in range(2):
        start_handler(*SAMPLES, "--poll", "1000")
    wait_for(is_running)
    wait_for(lambda: len(rows("SELECT 1 FROM job_workers")) == 2)
    os.kill(worker_pid(rows), signal.SIGKILL)
    killed = time.monotonic()
    wait_for(lambda: rows("SELECT 1 FROM job_steps WHERE attempts = 2 AND state = 'Running'"),
             timeout=5)
    assert time.monotonic() - killed < 2
    wait_for(lambda: rows("SELECT 1 FROM job_instances WHERE state = 'Finished'"))


def test_a_step_that_kills_its_worker_is_given_up_after_three(run_handler, ask, rows, states):
    ask("ok", "kill", "ok")
    for _ in range(3):
        run_handler("--once", *SAMPLES, expect=-signal.SIGKILL)
    assert states() == ["Finished", "Running", "Created"]
    run_handler("--once", *SAMPLES, expect=1)
    assert states() == ["Finished", "Failed", "Finished"]
    comment = rows("SELECT comment FROM job_steps WHERE state = 'Failed'")[0][0]
    assert comment.startswith(
        "Its worker died in this step 3 times; it is not run again by itself.")
    assert rows("SELECT state, comment FROM job_instances") == [
        ("Failed", "1 (33.33%) steps failed")]


def test_a_pool_survives_a_step_that_kills_its_workers(run_handler, ask, states):
    ask("kill", "ok")
    ask("ok")
    run_handler("--once", *SAMPLES, "--workers", "2", expect=1)
    assert states() == ["Failed", "Finished", "Finished"]


def test_a_worker_that_was_taken_over_writes_no_more(start_handler, ask, rows, states, is_running):
    ask("sleep", "ok", sleep=1)
    first = start_handler(*SAMPLES)
    wait_for(is_running)
    with_lock = worker_pid(rows)
    rows("UPDATE job_instances SET worker_id = NULL RETURNING 1")  # as an operator may do by hand
    start_handler(*SAMPLES)
    wait_for(lambda: states("job_instances") == ["Finished"])
    wait_for(lambda: (b"dropped: job 1 was taken over; step 1 is not recorded"
                      in first.log.read_bytes()))
    assert first.poll() is None  # it goes on with other work
    assert with_lock == first.pid
    assert effects(rows) == (2, 2)


def test_a_stopped_worker_finds_its_job_done_when_it_wakes(start_handler, run_handler, ask, rows,
                                                           states, is_running):
    ask("sleep", "ok", sleep=0.3)
    stopped = start_handler(*SAMPLES)
    wait_for(is_running)
    stopped.send_signal(signal.SIGSTOP)
    rows("SELECT pg_terminate_backend(backend_pid, 5000) FROM job_workers")
    run_handler("--once", *SAMPLES)
    assert states() == ["Finished"] * 2
    stopped.send_signal(signal.SIGCONT)
    wait_for(lambda: b"is back" in stopped.log.read_bytes())
    assert rows("SELECT attempts FROM job_steps ORDER BY id") == [(2,), (1,)]
    assert effects(rows) == (2, 2)


def test_a_worker_that_lost_its_connection_goes_on_with_its_job(start_handler, ask, rows, states,
                                                                is_running):
    ask("ok", "sleep", "ok", sleep=0.3)
    handler = start_handler(*SAMPLES)
    wait_for(lambda: is_running(1))
    worker = rows("SELECT worker_id FROM job_instances")
    rows("SELECT pg_terminate_backend(backend_pid) FROM job_workers")
    wait_for(lambda: states("job_instances") == ["Finished"])
    assert effects(rows) == (3, 3)
    assert rows("SELECT id FROM job_workers") == worker  # under the same id
    assert handler.poll() is None


def test_a_hanging_worker_is_ended_by_a_neighbour(start_handler, run_handler, ask, rows, states,
                                                  is_running):
    ask("sleep", "ok")
    hanging = start_handler(*SAMPLES)
    wait_for(is_running)
    hanging.send_signal(signal.SIGSTOP)
    run_handler("--once", *SAMPLES)
    assert states() == ["Running", "Created"]  # it may only be slow
    rows("UPDATE job_steps SET started = now() - interval '1 hour 61 s' "
         "WHERE state = 'Running' RETURNING 1")
    run_handler("--once", *SAMPLES, expect=1)
    assert states() == ["Failed", "Finished"]
    assert rows("SELECT comment FROM job_steps")[0][0].startswith(
        "Overrun: longer than the step limit of 01:00:00")


def test_a_worker_that_hangs_at_its_commit_keeps_no_neighbour(run_handler, ask, rows, states, dsn):
    ask("ok", "ok")
    hanging = Worker(dsn)
    jobs.take_up(hanging, claim(hanging, "Transactional"))
    rows("UPDATE job_steps SET started = now() - interval '1 hour 61 s' "
         "WHERE state = 'Running' RETURNING 1")
    hanging.connection.execute("BEGIN")
    hanging.connection.execute(
        "UPDATE job_steps SET state = 'Finished', finished = now() WHERE position = 1")
    run_handler("--once", *SAMPLES)
    with pytest.raises(psycopg.OperationalError):
        hanging.connection.execute("COMMIT")
    assert states("job_instances") == ["Finished"]
    assert rows("SELECT attempts FROM job_steps ORDER BY position") == [(2,), (1,)]


def test_a_worker_that_hangs_in_a_recovery_does_not_keep_the_job(ask, rows, dsn, monkeypatch):
    monkeypatch.setattr(worker, "HANG_WAIT", "100ms")
    ask("ok")
    dead, neighbour = Worker(dsn), Worker(dsn)
    jobs.take_up(dead, claim(dead, "Transactional"))
    rows(f"SELECT pg_terminate_backend({dead.connection.info.backend_pid}, 5000)")
    with Proxy(dsn, silent_at=b"NOWAIT") as proxy:
        hanging = Worker(proxy.dsn)

        def hang():
            with contextlib.suppress(psycopg.Error):  # in the end
                recover(hanging)
        threading.Thread(target=hang, daemon=True).start()
        wait_for(proxy.silent.is_set)
        assert wait_for(lambda: recover(neighbour), timeout=5) == {1: "Queued"}
    neighbour.close()


def test_a_dead_worker_of_a_long_step_is_no_overrun(start_handler, run_handler, ask, rows, states,
                                                    is_running):
    ask("sleep", sleep=0.2)
    handler = start_handler(*SAMPLES)
    wait_for(is_running)
    handler.kill()
    handler.wait()
    # nobody looked for hours
    rows("UPDATE job_steps SET started = now() - interval '3 hours' RETURNING 1")
    run_handler("--once", *SAMPLES)
    assert states() == ["Finished"]


def test_restarts_of_postgresql_cost_nothing_and_are_no_deaths(server, start_handler, ask, rows,
                                                               states):
    ask(*["sleep"] * 12, sleep=0.25)
    start_handler(*SAMPLES, "--workers", "2")
    for n in range(4):
        wait_for(lambda n=n: states().count("Finished") >= 2 * n + 1)
        server.restart("immediate")
    wait_for(lambda: states("job_instances") == ["Finished"])
    assert effects(rows) == (12, 12)
    assert rows("SELECT max(attempts) FROM job_steps")[0][0] <= 2


def test_a_connection_lost_while_starting_is_not_the_end(conn, dsn, monkeypatch):
    """Between taking an id and the first claim, too."""
    write_types = control.write_types
    write_types(conn, ["Noop"])
    job_id = control.create_job(conn, "Noop", {})
    losses = iter([True, True])

    def lose_then_write(connection, names):
        if next(losses, False):
            conn.execute("SELECT pg_terminate_backend(%s, 5000)", [connection.info.backend_pid])
        write_types(connection, names)
    monkeypatch.setattr(control, "write_types", lose_then_write)
    assert handler.JobHandler(dsn, types=["Noop"], once=True).run() == handler.OK
    assert conn.execute("SELECT state FROM job_instances WHERE id = %s",
                        [job_id]).fetchone()["state"] == "Finished"


def test_all_workers_are_back_soon_after_a_restart(server, start_handler, conn, rows):
    for _ in range(3):
        start_handler("--poll", "1000")
    wait_for(lambda: len(rows("SELECT 1 FROM job_workers")) == 3)
    server.restart("fast")
    wait_for(lambda: rows("SELECT count(*) FROM pg_locks l "
                          "JOIN job_workers w ON w.backend_pid = l.pid "
                          "WHERE l.locktype = 'advisory'") == [(3,)], timeout=10)


def test_once_gives_up_when_the_database_stays_away(start_handler, server, ask, rows, conn,
                                                    is_running):
    ask("sleep", sleep=0.3)
    handler = start_handler("--once", *SAMPLES)
    wait_for(is_running)
    name = conn.info.dbname
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        try:
            admin.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                          "WHERE datname = %s", [name])
            assert handler.wait(timeout=30) == 3
        finally:
            admin.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
    assert b"cannot reach the database" in handler.log.read_bytes()
    assert rows("SELECT state FROM job_steps") == [("Running",)]  # left to whoever looks next


def test_a_dead_worker_process_is_replaced(start_handler, ask, rows, states, is_running):
    start_handler(*SAMPLES, "--workers", "2")
    wait_for(lambda: len(rows("SELECT 1 FROM job_workers")) == 2)
    ask("sleep", "ok", sleep=0.3)
    wait_for(is_running)
    dead = worker_pid(rows)
    os.kill(dead, signal.SIGKILL)
    wait_for(lambda: states("job_instances") == ["Finished"])
    wait_for(lambda: [pid for (pid,) in rows("SELECT pid FROM job_workers") if pid != dead][1:])


def test_a_killed_handler_takes_its_workers_down_after_their_step(start_handler, ask, rows, states,
                                                                  is_running):
    ask("sleep", "ok", sleep=0.5)
    handler = start_handler(*SAMPLES, "--workers", "2")
    wait_for(is_running)
    handler.kill()
    wait_for(lambda: rows("SELECT 1 FROM job_workers") == [])
    assert states() == ["Finished", "Created"]
    assert rows("SELECT state, worker_id FROM job_instances") == [("Queued", None)]


def test_a_full_disk_fails_the_step_that_met_it(run_handler, ask, states):
    ask("ok", "disk full", "ok")
    run_handler("--once", *SAMPLES, expect=1)
    assert states() == ["Finished", "Failed", "Finished"]


def test_twenty_handlers_at_once_share_the_work(start_handler, ask, rows, states):
    for _ in range(30):
        ask("ok", "ok")
    handlers = [start_handler("--once", *SAMPLES) for _ in range(20)]
    assert [h.wait(timeout=60) for h in handlers] == [0] * 20
    assert states("job_instances") == ["Finished"] * 30
    assert effects(rows) == (60, 60)


def test_an_old_snapshot_holds_nobody_up(dsn, run_handler, ask, states):
    with psycopg.connect(dsn) as other:
        other.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        other.execute("SELECT * FROM job_instances")
        for _ in range(5):
            ask("ok")
        run_handler("--once", *SAMPLES)
    assert states("job_instances") == ["Finished"] * 5


def test_claim_finish_cancel_retry_and_recovery_do_not_deadlock(dsn, ask):
    """Everybody at the same few jobs for a while; what must not happen raises in its thread."""
    ids = [ask("ok", "error", "ok", type_name="Scripted") for _ in range(6)]
    until, problems, ran = time.monotonic() + 2, [], []

    def operator(act):
        with perfdb.connect(dsn) as connection:
            while time.monotonic() < until:
                try:
                    act(connection, random.choice(ids))
                except ValueError:
                    pass  # not in this state
                except psycopg.Error as exc:
                    problems.append(exc)

    def work():
        while time.monotonic() < until:
            worker = Worker(dsn)
            try:
                for _ in range(10):
                    recover(worker)
                    if job := claim(worker, "Scripted"):
                        run(worker, job)
            except psycopg.Error as exc:
                problems.append(exc)
            worker.connection.close()  # without a word: its jobs are orphans

    def run(worker, job):
        with contextlib.suppress(jobs.JobTakenOver, ValueError):
            instance = jobs.take_up(worker, job)
            if random.random() < 0.7:
                instance.run()
                ran.append(job.id)

    threads = [threading.Thread(target=operator, args=[act]) for act in (
        lambda c, i: control.cancel_job(c, i), lambda c, i: control.retry_job(c, i),
        lambda c, i: control.retry_job(c, i, True))]
    threads += [threading.Thread(target=work) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    use_worker(None)
    assert problems == []
    assert len(ran) > 10
