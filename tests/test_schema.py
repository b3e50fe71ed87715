"""The tables refuse nonsense, and say of every column what it is."""

import psycopg
import pytest

TYPE_SQL = "INSERT INTO job_types (name) VALUES ('Noop') RETURNING id"
JOB_SQL = ("INSERT INTO job_instances (job_type_id, description, parameters) "
           "VALUES (%s, 'x', '{}') RETURNING *")


@pytest.fixture
def job(conn):
    return conn.execute(JOB_SQL, [conn.execute(TYPE_SQL).fetchone()["id"]]).fetchone()


@pytest.fixture
def step(conn, job):
    return conn.execute(
        "INSERT INTO job_steps (job_instance_id, position) VALUES (%s, 1) RETURNING *",
        [job["id"]]).fetchone()


def test_three_columns_are_a_complete_request(job):
    assert (job["state"], job["priority"], job["attempts"]) == ("Created", 0, 0)
    assert job["created"] == job["run_after"] == job["last_state_change"]


def test_there_are_five_states_and_no_sixth(conn):
    names = [r["name"] for r in conn.execute("SELECT name FROM job_states")]
    assert names == ["Created", "Queued", "Running", "Finished", "Failed"]
    with pytest.raises(psycopg.errors.CheckViolation):
        conn.execute("INSERT INTO job_states VALUES ('Paused', '')")


@pytest.mark.parametrize(("constraint", "change"), [
    ("job_state_fits_its_times", "state = 'Paused'"),
    ("job_state_fits_its_times", "state = 'Finished'"),
    ("job_state_fits_its_times", "finished = now()"),
    ("job_state_fits_its_times", "state = 'Running'"),
    ("job_columns_make_sense", "parameters = '[]'"),
    ("job_columns_make_sense", "attempts = -1"),
    *[("job_columns_make_sense", f"{column} = '{moment}'")
      for column in ("run_after", "created", "cancel_requested", "last_state_change")
      for moment in ("infinity", "-infinity", "20000-01-01", "1899-12-31")],
    ("job_columns_make_sense", "state = 'Running', started = 'infinity'"),
    ("job_columns_make_sense", "state = 'Failed', finished = '3000-01-02'"),
])
def test_a_job_cannot_lie(conn, job, constraint, change):
    with pytest.raises(psycopg.errors.CheckViolation) as exc:
        conn.execute(f"UPDATE job_instances SET {change}")
    assert exc.value.diag.constraint_name == constraint


@pytest.mark.parametrize(("constraint", "change"), [
    ("step_state_fits_its_times", "state = 'Paused'"),
    ("step_state_fits_its_times", "state = 'Failed'"),
    ("step_state_fits_its_times", "finished = now()"),
    ("step_state_fits_its_times", "state = 'Running'"),
    ("step_columns_make_sense", "parameters = '7'"),
    ("step_columns_make_sense", "position = -1"),
    ("step_columns_make_sense", "attempts = -1"),
    ("step_columns_make_sense", "started = '-infinity'"),
    ("step_columns_make_sense", "state = 'Finished', finished = '20000-01-01'"),
])
def test_a_step_cannot_lie(conn, step, constraint, change):
    with pytest.raises(psycopg.errors.CheckViolation) as exc:
        conn.execute(f"UPDATE job_steps SET {change}")
    assert exc.value.diag.constraint_name == constraint


@pytest.mark.parametrize(("constraint", "insert"), [
    ("job_type_step_timeout_is_positive",
     "INSERT INTO job_types (name, step_timeout) VALUES ('x', '101 years')"),
    ("job_type_retry_delay_not_negative",
     "INSERT INTO job_types (name, retry_delay) VALUES ('x', '101 years')"),
    ("schedule_every_is_sensible",
     "INSERT INTO job_schedules (job_type_id, every, next_start) VALUES (1, '0', now())"),
    ("schedule_next_start_is_sensible",
     "INSERT INTO job_schedules (job_type_id, every, next_start) "
     "VALUES (1, '1 day', '-infinity')"),
    ("object_bazefield_id_is_16_hex_digits",
     "INSERT INTO objects (object_model_id, name, bazefield_id) VALUES (1, 'LAN-01', '12')"),
    ("feature_sample_interval_is_positive",
     "INSERT INTO features (object_model_id, name, sample_interval) VALUES (1, 'p', '0')"),
    ("alarm_period_ends_after_it_starts",
     "INSERT INTO alarms_history (object_id, alarm_id, start_time, end_time) "
     "VALUES (1, 1, now(), now())"),
])
def test_the_other_tables_refuse_nonsense_too(conn, constraint, insert):
    with pytest.raises(psycopg.errors.CheckViolation) as exc:
        conn.execute(insert)
    assert exc.value.diag.constraint_name == constraint


def test_last_state_change_is_kept_whoever_changes_the_state(conn, job):
    changed = conn.execute("UPDATE job_instances SET state = 'Queued' "
                           "RETURNING last_state_change").fetchone()
    assert changed["last_state_change"] > job["last_state_change"]
    same = conn.execute("UPDATE job_instances SET comment = 'x' "
                        "RETURNING last_state_change").fetchone()
    assert same == changed


UNCOMMENTED_SQL = """
SELECT c.relname, a.attname
  FROM pg_class c
  JOIN pg_attribute a ON a.attrelid = c.oid
                     AND (a.attnum > 0 OR a.attnum = -1) AND NOT a.attisdropped
 WHERE c.relkind IN ('r', 'v')
   AND c.relnamespace = current_schema()::regnamespace
   AND (   c.relkind = 'r' AND a.attnum > 0 AND col_description(c.oid, a.attnum) IS NULL
        OR a.attnum = -1 AND obj_description(c.oid, 'pg_class') IS NULL)
"""


def test_every_table_and_column_has_a_comment(conn):
    assert conn.execute(UNCOMMENTED_SQL).fetchall() == []


def test_the_view_tells_how_far_a_job_is(conn, job):
    conn.execute("UPDATE job_instances SET state = 'Running', started = now() - interval '1 min'")
    conn.execute("""
        INSERT INTO job_steps (job_instance_id, position, name, state, started, finished) VALUES
        (%(job)s, 1, 'a', 'Finished', now(), now()),
        (%(job)s, 2, 'b', 'Failed', now(), now()),
        (%(job)s, 3, 'c', 'Running', now(), NULL),
        (%(job)s, 4, 'd', 'Created', NULL, NULL)""", {"job": job["id"]})
    line = conn.execute("SELECT * FROM v_job_instances").fetchone()
    assert (line["job_type"], line["running_step"], line["progress"]) == ("Noop", "c", 0.5)
    assert (line["steps_total"], line["steps_done"], line["steps_failed"]) == (4, 1, 1)
    assert line["running_time"].total_seconds() >= 60
    assert line["running_step_since"] is not None
