"""Who owns a job: ids that nobody shares, a lock that is not waited for long, rows of the dead."""

import psycopg
import pytest
import sample_jobs

import control
import handler
import worker
from worker import Worker, use_worker


@pytest.fixture
def mine(dsn, conn):
    control.write_types(conn, ["Scripted"])
    mine = Worker(dsn)
    use_worker(mine)
    yield mine
    use_worker(None)
    mine.close()


@pytest.fixture
def workers(conn):
    return lambda: [row["id"] for row in
                    conn.execute("SELECT id FROM job_workers ORDER BY started")]


def end_session(conn, mine):
    conn.execute("SELECT pg_terminate_backend(%s, 5000)", [mine.connection.info.backend_pid])


def test_ids_are_random_and_the_lock_is_on_all_64_bits(mine, conn, dsn):
    other = Worker(dsn)
    assert mine.id != other.id
    assert max(mine.id, other.id) > 2**32
    held = conn.execute(
        "SELECT pg_try_advisory_lock(%s) AS mine, pg_try_advisory_lock(%s) AS near",
        [mine.id, mine.id ^ 2**40]).fetchone()
    assert held == {"mine": False, "near": True}
    other.close()


def test_a_worker_that_nobody_forgot_comes_back_under_its_id(mine, conn, workers):
    before = mine.id
    end_session(conn, mine)
    mine.reconnect()
    assert (mine.id, workers()) == (before, [before])


def test_a_worker_that_was_forgotten_goes_on_under_a_new_id(mine, conn, workers):
    """As after a failover to a standby that was behind."""
    before = mine.id
    end_session(conn, mine)
    conn.execute("DELETE FROM job_workers")
    mine.reconnect()
    assert mine.id != before
    assert workers() == [mine.id]
    assert conn.execute("SELECT pg_try_advisory_lock(%s) AS free", [before]).fetchone()["free"]


def test_a_worker_does_not_wait_long_for_a_lock_that_somebody_has(mine, conn, monkeypatch):
    monkeypatch.setattr(worker, "LOCK_WAIT", "50ms")
    before = mine.id
    end_session(conn, mine)
    conn.execute("SELECT pg_advisory_lock(%s)", [before])
    mine.reconnect()
    assert mine.id != before


def test_a_former_session_the_server_has_not_missed_is_ended(mine, conn, dsn):
    ghost, mine.connection = mine.connection, psycopg.connect(dsn)
    mine.reconnect()
    with pytest.raises(psycopg.OperationalError):
        ghost.execute("SELECT 1")


def test_only_workers_that_are_dead_are_cleaned_away(mine, conn, dsn, workers):
    conn.execute("INSERT INTO job_workers (id, host, pid, backend_pid) "
                 "SELECT n, 'gone', 1, 1 FROM generate_series(1, 3000) AS n")
    assert handler.JobHandler(dsn, once=True).run() == handler.OK
    assert mine.id in workers()
    assert len(workers()) == 3000 - 100 + 1


def test_a_second_construction_of_a_queued_job_is_refused(mine):
    job_id = control.create_job(mine.connection, "Scripted", {"steps": ["ok"]})
    sample_jobs.Scripted(job_id)
    with pytest.raises(ValueError, match=f"job {job_id} is in state 'Queued', not 'Created'"):
        sample_jobs.Scripted(job_id)


def test_a_job_in_another_hand_is_not_taken_up(mine, conn):
    job_id = control.create_job(mine.connection, "Scripted", {"steps": ["ok"]})
    conn.execute("UPDATE job_instances SET worker_id = 4711")
    with pytest.raises(ValueError, match="another worker has it"):
        sample_jobs.Scripted(job_id)
    assert conn.execute("SELECT state, worker_id FROM job_instances").fetchone() == {
        "state": "Created", "worker_id": 4711}


def test_by_hand_too_no_more_of_a_type_run_than_may(mine, conn):
    conn.execute("UPDATE job_types SET max_running = 1")
    first, second = (
        control.create_job(mine.connection, "Scripted", {"steps": ["ok"]}) for _ in "12")
    job = sample_jobs.Scripted(first)
    with pytest.raises(ValueError, match="as many of its type run as may"):
        sample_jobs.Scripted(second)
    job.run()
    assert sample_jobs.Scripted(second).run() == []
