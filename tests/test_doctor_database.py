"""What doctor says of the database around the job system."""

import psycopg
import pytest
from helpers import flush_statistics
from psycopg.conninfo import make_conninfo

import doctor_database
import doctor_schema
import perfdb
from worker import Worker


@pytest.fixture
def runner(conn, dsn):
    """A connection string for a role that may read and write all, but owns nothing."""
    conn.execute("CREATE ROLE runner LOGIN; GRANT ALL ON ALL TABLES IN SCHEMA public TO runner")
    yield make_conninfo(dsn, user="runner")
    conn.execute("DROP OWNED BY runner; DROP ROLE runner")


def test_row_security_without_a_policy_is_said(conn, runner, run_handler):
    conn.execute("INSERT INTO job_types (name) VALUES ('Noop')")
    assert list(doctor_database.row_security(conn)) == []
    conn.execute("ALTER TABLE job_instances ENABLE ROW LEVEL SECURITY")
    (said,) = doctor_database.row_security(conn)
    assert "job_instances without a policy and hides every row from everybody but the o" in said
    with perfdb.connect(runner) as connection:
        (said,) = doctor_database.row_security(connection)
    assert "hides every row from this role" in said
    done = run_handler("--once", "--dsn", runner, expect=3)
    assert "row security is on for job_instances without a policy" in done.stderr
    conn.execute(said.partition(" or ")[2])  # the remedy
    run_handler("--once", "--dsn", runner)
    conn.execute("DROP POLICY perf ON job_instances;"
                 "ALTER TABLE job_instances DISABLE ROW LEVEL SECURITY")


def test_a_stranger_with_the_lock_of_a_worker_is_named(conn, dsn):
    worker = Worker(dsn)
    assert list(doctor_database.strangers(conn)) == []
    conn.execute("INSERT INTO job_workers (id, host, pid, backend_pid) VALUES (47, 'gone', 1, 1)")
    with psycopg.connect(dsn, application_name="nightly") as stranger:
        stranger.execute("SELECT pg_advisory_lock(47), pg_advisory_lock(0, 47)")
        (said,) = doctor_database.strangers(conn)
        pid = stranger.info.backend_pid
        assert f"session {pid} (postgres, 'nightly') holds the advisory lock of worker 47 " in said
    worker.close()


def test_rows_of_dead_workers_are_counted_and_go(conn, run_handler):
    conn.execute("INSERT INTO job_workers (id, host, pid, backend_pid) SELECT n, 'gone', 1, 1 "
                 "FROM generate_series(1, 3000) AS n")
    (said,) = doctor_database.dead_workers(conn)
    assert "3000 rows of dead workers" in said
    run_handler("--once")
    assert conn.execute("SELECT count(*) AS n FROM job_workers").fetchone()["n"] < 3000


def test_dead_rows_that_nobody_cleans_are_counted(conn, monkeypatch):
    assert list(doctor_database.dead_rows(conn)) == []
    monkeypatch.setattr(doctor_database, "MANY_DEAD_ROWS", 100)
    conn.execute("ALTER TABLE job_workers SET (autovacuum_enabled = off)")
    conn.execute("INSERT INTO job_workers (id, host, pid, backend_pid) SELECT n, 'gone', 1, 1 "
                 "FROM generate_series(1, 3000) AS n")
    conn.execute("DELETE FROM job_workers WHERE id > 10")
    flush_statistics(conn)
    (said,) = doctor_database.dead_rows(conn)
    assert "job_workers has 2990 of them beside 10 live ones" in said
    conn.execute(said.rpartition(": ")[2])  # the remedy
    flush_statistics(conn)
    assert list(doctor_database.dead_rows(conn)) == []
    conn.execute("ALTER TABLE job_workers RESET (autovacuum_enabled)")


def test_sessions_that_are_read_only_are_no_standby(conn):
    conn.execute("SET default_transaction_read_only = on")
    (note,) = doctor_schema.schema(conn)
    assert "sessions of this role are read only" in note
    assert isinstance(note, doctor_database.Note)
