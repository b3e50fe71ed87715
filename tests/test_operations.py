"""What OPERATIONS.md and examples/ tell people to type works."""

import re
from pathlib import Path

import psycopg
import pytest
from park import add_samples, every_ten_minutes, make_park
from psycopg.conninfo import make_conninfo

import alarm_calc  # noqa: F401  its type
import control
import jobs
import perfdb
import samples
from worker import Worker

ROOT = Path(__file__).parents[1]
OPERATIONS = (ROOT / "OPERATIONS.md").read_text()
GRANTS = re.search(r"```sql\n(CREATE ROLE.*?)```", OPERATIONS, re.DOTALL)[1]
PARAMETERS = {"object_names": ["LAN-01"], "alarm_ids": [111],
              "start": "2026-03-01 00:00:00", "end": "2026-03-02 00:00:00"}


@pytest.fixture
def roles(conn, dsn):
    """The three roles of OPERATIONS.md; a function from a role's name to its connection string."""
    control.write_types(conn, ["Alarm Calculation"])
    make_park(conn)
    add_samples(conn, every_ten_minutes([9, 11, 11]))
    conn.execute(GRANTS)
    yield lambda role: make_conninfo(dsn, user=role)
    for role in re.findall(r"CREATE ROLE (\w+)", GRANTS):
        conn.execute(f"DROP OWNED BY {role}")
        conn.execute(f"DROP ROLE {role}")


def test_each_role_can_do_its_work(roles, run_handler, conn):
    with perfdb.connect(roles("perf_ask")) as ask:
        job_id = control.create_job(ask, "Alarm Calculation", PARAMETERS, "by the front end",
                                    unique_key="a", priority=1)
        assert control.create_job(ask, "Alarm Calculation", PARAMETERS, unique_key="a") == job_id
    conn.execute("INSERT INTO job_schedules (job_type_id, parameters, every, next_start) "
                 "VALUES (1, %s, '1 day', now() - interval '1.5 days')", [jobs.Jsonb(PARAMETERS)])
    run_handler("--once", "--workers", "2", "--dsn", roles("perf_run"))
    with perfdb.connect(roles("perf_look")) as look:
        assert look.execute("SELECT state, steps_done FROM v_job_instances").fetchall() == [
            ("Finished", 1)] * 2
        assert look.execute("SELECT count(*) FROM v_job_steps").fetchone() == (2,)
        assert look.execute("SELECT count(*) FROM alarms_history").fetchone() == (1,)


def test_the_loading_role_loads_and_asks(roles, tmp_path, monkeypatch):
    monkeypatch.setenv("PERFDB_DSN", roles("perf_load"))
    file = tmp_path / "LAN-01.csv"
    for value in (1, 2):
        file.write_text(f"time,wind_speed\n2026-03-01 00:10,{value}\n2026-03-01 01:00,{value}\n")
        assert samples.main(["load", str(file), "--zone", "UTC", "--stamps", "end",
                             "--recalculate"]) == 0
    with perfdb.connect(roles("perf_look")) as look:
        assert look.execute("SELECT count(*) FROM job_instances").fetchone() == (2,)


def test_the_running_role_recovers_cancels_and_retries(roles, conn, run_handler):
    job_id = control.create_job(conn, "Alarm Calculation", PARAMETERS)
    conn.execute("UPDATE job_instances SET worker_id = 4711, state = 'Running', "
                 "started = now()")  # of a dead worker
    with perfdb.connect(roles("perf_run")) as run:
        assert control.cancel_job(run, job_id) == "Running"
        run_handler("--once", "--dsn", roles("perf_run"), expect=1)
        assert control.retry_job(run, job_id) == "Created"
    run_handler("--once", "--dsn", roles("perf_run"))


@pytest.mark.parametrize(("role", "statement"), [
    ("perf_ask", "UPDATE job_instances SET state = 'Failed', finished = now()"),
    ("perf_ask", "UPDATE job_instances SET comment = 'x'"),
    ("perf_ask", "DELETE FROM job_instances"),
    ("perf_ask", "INSERT INTO job_instances (job_type_id, state) VALUES (1, 'Queued')"),
    ("perf_ask", "INSERT INTO job_instances (job_type_id, worker_id) VALUES (1, 1)"),
    ("perf_ask", "INSERT INTO job_instances (job_type_id, comment) VALUES (1, 'x')"),
    ("perf_ask", "UPDATE job_types SET max_running = 9"),
    ("perf_ask", "INSERT INTO job_steps (job_instance_id, position) VALUES (1, 1)"),
    ("perf_ask", "DELETE FROM alarms_history"),
    ("perf_run", "DELETE FROM job_instances"),
    ("perf_run", "UPDATE job_types SET max_running = 9"),
    ("perf_run", "UPDATE alarms SET trigger = '{}'"),
    ("perf_run", "DELETE FROM feature_values"),
    ("perf_load", "DELETE FROM feature_values"),
    ("perf_load", "UPDATE alarms SET trigger = '{}'"),
    ("perf_look", "INSERT INTO job_instances (job_type_id) VALUES (1)"),
    ("perf_look", "UPDATE job_instances SET comment = 'x'"),
])
def test_no_role_can_do_more(roles, role, statement):
    with (perfdb.connect(roles(role)) as connection,
          pytest.raises(psycopg.errors.InsufficientPrivilege)):
        connection.execute(statement)


def test_the_dashboard_queries_run(conn):
    for query in re.sub(r"--.*", "", (ROOT / "examples" / "grafana.sql").read_text()).split(";"):
        if query.strip():
            conn.execute(query)


@pytest.mark.parametrize("statement", re.findall("`((?:SELECT|UPDATE) [^`]*)`", OPERATIONS))
def test_the_statements_in_the_text_run(conn, statement):
    conn.execute(statement)


def test_the_statement_that_shows_the_workers_locks_finds_them(conn, dsn):
    (statement,) = re.findall("See it: `([^`]*)`", OPERATIONS)
    worker = Worker(dsn)
    assert [row["granted"] for row in conn.execute(statement)] == [True]
    worker.close()
