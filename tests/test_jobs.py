"""JobInstance as a job file's author meets it: the object's life, its states and its texts."""

import socket
import time
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
import sample_jobs
from helpers import claim, flush_statistics

import control
import jobs
import perfdb
from jobs import JobInstance, JobRequestError
from worker import Worker, use_worker

PERIOD = {"start": "2026-03-01 00:00:00", "end": "2026-04-01 00:00:00"}


@pytest.fixture
def worker(dsn, conn):
    worker = Worker(dsn)
    control.write_types(worker.connection, ["Scripted", "Transactional", "Noop"])
    worker.connection.execute("CREATE TABLE trace (job_id bigint, step_id bigint)")
    use_worker(worker)
    yield worker
    use_worker(None)
    worker.close()


@pytest.fixture
def insert(conn, worker):
    """Ask for a job as a front end does, by plain INSERT; return its id."""
    def insert(type_name="Scripted", steps=("ok",), description="night run", **parameters):
        return conn.execute(
            "INSERT INTO job_instances (job_type_id, description, parameters) "
            "SELECT id, %s, %s FROM job_types WHERE name = %s RETURNING id", [
                description, jobs.Jsonb({"steps": list(steps)} | parameters), type_name,
            ]).fetchone()["id"]
    return insert


@pytest.fixture
def row(conn):
    def row(job_id):
        return conn.execute("SELECT * FROM job_instances WHERE id = %s", [job_id]).fetchone()
    return row


@pytest.fixture
def steps(conn):
    def steps(job_id):
        return conn.execute("SELECT * FROM job_steps WHERE job_instance_id = %s ORDER BY position",
                            [job_id]).fetchall()
    return steps


def test_a_job_is_queued_with_its_steps_and_then_run(insert, row, steps):
    job_id = insert(steps=["ok", "fine"])
    job = sample_jobs.Scripted(job_id)
    assert (job.job_id, job.name, job.description) == (job_id, "Scripted", "night run")
    assert job.parameters == {"steps": ["ok", "fine"]}
    assert row(job_id)["state"] == "Queued"
    assert job.job_step_ids == [s["id"] for s in steps(job_id)]
    assert [(s["position"], s["name"], s["state"]) for s in steps(job_id)] == [
        (1, "ok", "Created"), (2, "fine", "Created")]

    assert job.run() == []
    done = row(job_id)
    assert (done["state"], done["comment"], done["worker_id"], done["attempts"]) == (
        "Finished", None, None, 1)
    assert done["created"] <= done["started"] <= done["finished"]
    assert [(s["state"], s["result"], s["attempts"]) for s in steps(job_id)] == [
        ("Finished", {"said": "ok"}, 1), ("Finished", {"said": "fine"}, 1)]


def test_a_failed_step_does_not_stop_the_others(insert, row, steps):
    job = sample_jobs.Scripted(insert(steps=["ok", "error", "ok", "crash"]))
    failed = job.run()
    assert failed == [job.job_step_ids[1], job.job_step_ids[3]]
    assert row(job.job_id)["state"] == "Failed"
    assert row(job.job_id)["comment"] == "2 (50.00%) steps failed"
    assert [(s["state"], s["comment"]) for s in steps(job.job_id)] == [
        ("Finished", None), ("Failed", "no wind"), ("Finished", None),
        ("Failed", "Unknown error, please check the logs: division by zero")]


def test_the_traceback_of_an_unknown_error_is_logged(insert, caplog):
    sample_jobs.Scripted(insert(steps=["crash", "error"])).run()
    assert "1 / 0" in caplog.text
    assert caplog.text.count("Traceback") == 1  # a JobStepError says all there is to say


@pytest.mark.parametrize(("step", "comment"), [
    ("exit", "Unknown error, please check the logs: 7"),
    ("open", "The step left a transaction open; it was rolled back"),
    ("nul", "a\N{REPLACEMENT CHARACTER}b?"),
    ("unjson", "The step's result is no JSON object, so it is not stored:\n  $.x: object <object"),
])
def test_whatever_a_step_does_is_its_own_failure(insert, steps, row, step, comment):
    job = sample_jobs.Scripted(insert(steps=[step, "ok"]))
    assert job.run() == [job.job_step_ids[0]]
    first, second = steps(job.job_id)
    assert first["comment"].startswith(comment)
    assert second["state"] == "Finished"


def test_a_job_without_steps_is_finished_and_says_so(insert, row):
    job = sample_jobs.Scripted(insert(steps=[]))
    assert (job.job_step_ids, job.run()) == ([], [])
    assert row(job.job_id)["state"] == "Finished"
    assert "No steps" in row(job.job_id)["comment"]


def test_while_it_runs_the_tables_and_the_session_say_so(insert, row, steps, conn, worker):
    seen = {}

    class Watched(sample_jobs.Scripted):
        def _run_step(self, step_id):
            seen["job"], seen["steps"] = row(self.job_id), steps(self.job_id)
            seen["session"] = conn.execute(
                "SELECT application_name FROM pg_stat_activity WHERE pid = %s",
                [self.connection.info.backend_pid]).fetchone()["application_name"]

    job_id = insert(steps=["ok", "ok"])
    conn.execute("UPDATE job_instances SET comment = 'old words' WHERE id = %s", [job_id])
    Watched(job_id).run()
    assert (seen["job"]["state"], seen["job"]["comment"]) == ("Running", None)
    assert seen["job"]["worker_id"] == worker.id
    assert [s["state"] for s in seen["steps"]] == ["Finished", "Running"]
    assert seen["session"] == f"job {job_id} Scripted"


@pytest.mark.parametrize("job_id", ["1", 1.0, None, True])
def test_job_id_must_be_an_int(worker, job_id):
    with pytest.raises(TypeError, match="job_id must be an int"):
        sample_jobs.Scripted(job_id)


def test_a_class_needs_a_name(worker, insert):
    class Nameless(JobInstance):
        pass
    with pytest.raises(ValueError, match="Nameless has no _name"):
        Nameless(insert())


def test_no_such_job(worker):
    with pytest.raises(ValueError, match="there is no job 4711"):
        sample_jobs.Scripted(4711)


def test_a_job_of_another_type_is_refused_and_left_alone(insert, row):
    job_id = insert("Noop")
    with pytest.raises(ValueError, match="is of type 'Noop', but Scripted runs 'Scripted'"):
        sample_jobs.Scripted(job_id)
    assert row(job_id)["state"] == "Created"


@pytest.mark.parametrize("columns", [
    "state = 'Queued'",
    "state = 'Running', started = now()",
    "state = 'Finished', finished = now()",
    "state = 'Failed', finished = now()",
])
def test_only_a_created_job_is_taken_up(insert, conn, columns):
    job_id = insert()
    conn.execute(f"UPDATE job_instances SET {columns} WHERE id = %s", [job_id])
    state = columns.split("'")[1]
    with pytest.raises(ValueError, match=f"job {job_id} is in state '{state}'"):
        sample_jobs.Scripted(job_id)


@pytest.mark.parametrize("description", ["a test", "TESTing", "the latest figures"])
def test_a_test_job_is_skipped_and_nothing_changes(insert, row, steps, description):
    job_id = insert("Noop", description=description)
    before = row(job_id)
    job = sample_jobs.Scripted(job_id)  # not even its type is looked at
    assert (job.run(), job.job_step_ids) == ([], None)
    assert (row(job_id), steps(job_id)) == (before, [])


def test_a_test_job_runs_when_asked_to(insert, row):
    job_id = insert(description="a test")
    sample_jobs.Scripted(job_id, skip_test=False).run()
    assert row(job_id)["state"] == "Finished"


def test_steps_may_be_created_later(insert, row, steps):
    class Late(sample_jobs.Scripted):
        def __init__(self, job_id):
            super().__init__(job_id, delay_steps_creation=True)

    job = Late(insert())
    assert (row(job.job_id)["state"], steps(job.job_id), job.job_step_ids) == ("Created", [], None)
    with pytest.raises(ValueError, match=r"steps of job .* are not created"):
        job.run()
    job._create_database_steps()
    assert row(job.job_id)["state"] == "Queued"
    assert job.run() == []


def test_run_needs_the_state_queued(insert, conn):
    job = sample_jobs.Scripted(insert())
    job.run()
    with pytest.raises(ValueError, match="in state 'Finished', not 'Queued'"):
        job.run()


def test_two_classes_with_one_name_are_an_error():
    with pytest.raises(ValueError, match="job type 'Noop' is defined twice"):
        type("Other", (JobInstance,), {"_name": "Noop"})


def test_a_job_somebody_else_took_meanwhile_is_not_written_to(insert, row, conn):
    job = sample_jobs.Scripted(insert(steps=["ok", "ok"]))
    conn.execute("UPDATE job_instances SET worker_id = 4711 WHERE id = %s", [job.job_id])
    with pytest.raises(jobs.JobTakenOver):
        job.run()
    assert row(job.job_id)["state"] == "Queued"


# Parameters.

@pytest.mark.parametrize(("parameters", "problems"), [
    ({}, ["$: 'steps' is a required property"]),
    ({"steps": "ok", "wind": 3},
     ["$.steps: 'ok' is not of type 'array'",
      "$: Additional properties are not allowed ('wind' was unexpected)"]),
    ({"steps": ["ok", 7]}, ["$.steps[1]: 7 is not of type 'string'"]),
    ({"steps": [], "start": "2026-02-30 00:00:00"},
     ["$.start: '2026-02-30 00:00:00'", "day is out of range for month"]),
    ({"steps": [], "start": "yesterday"}, ["$.start: 'yesterday'", "YYYY-MM-DD HH:MM:SS"]),
    ({"steps": [], "start": PERIOD["end"], "end": PERIOD["end"]},
     ["$.end: '2026-04-01 00:00:00' is not after $.start '2026-04-01 00:00:00'"]),
])
def test_wrong_parameters_fail_the_job_with_all_problems(insert, row, conn, parameters, problems):
    job_id = insert()
    conn.execute("UPDATE job_instances SET parameters = %s WHERE id = %s",
                 [jobs.Jsonb(parameters), job_id])
    with pytest.raises(JobRequestError):
        sample_jobs.Scripted(job_id)
    failed = row(job_id)
    assert (failed["state"], failed["worker_id"]) == ("Failed", None)
    for problem in problems:
        assert problem in failed["comment"]


def test_the_same_problems_are_told_before_a_job_is_created(worker):
    with pytest.raises(JobRequestError) as exc:
        control.create_job(worker.connection, "Scripted", {"wind": 3})
    assert "$: 'steps' is a required property" in str(exc.value)
    assert "known parameters: steps, sleep, refuse, start, end" in str(exc.value)
    assert worker.connection.execute("SELECT count(*) FROM job_instances").fetchone() == (0,)


def test_a_job_of_a_type_only_the_table_knows_is_checked_too(worker):
    worker.connection.execute("INSERT INTO job_types (name, parameters_schema) VALUES "
                              "('Elsewhere', '{\"type\": \"object\", \"required\": [\"park\"]}')")
    with pytest.raises(JobRequestError, match="'park' is a required property"):
        control.create_job(worker.connection, "Elsewhere", {})
    assert control.create_job(worker.connection, "Elsewhere", {"park": "LAN"})


def test_an_unknown_type_is_refused_with_the_known_ones(worker):
    known = "'Noop', 'Scripted', 'Transactional'"
    with pytest.raises(JobRequestError, match=f"no job type 'Alarm'; known: {known}"):
        control.create_job(worker.connection, "Alarm", {})


def test_a_request_that_cannot_be_split_fails_with_the_whole_explanation(insert, row):
    job_id = insert(refuse="unknown object 'LAN-99'")
    with pytest.raises(JobRequestError):
        sample_jobs.Scripted(job_id)
    assert (row(job_id)["state"], row(job_id)["comment"]) == ("Failed", "unknown object 'LAN-99'")


def test_many_jobs_are_created_all_or_none_in_order(worker, conn):
    good = [{"steps": [str(n)]} for n in range(500)]
    ids = control.create_jobs(worker.connection, "Scripted", good)
    assert ids == sorted(ids)
    seventh = conn.execute("SELECT parameters FROM job_instances WHERE id = %s",
                           [ids[7]]).fetchone()
    assert seventh["parameters"] == good[7]
    with pytest.raises(JobRequestError, match=r"job 1: \$: 'steps' is a required property"):
        control.create_jobs(worker.connection, "Scripted", [good[0], {}])
    assert conn.execute("SELECT count(*) FROM job_instances").fetchone()["count"] == 500


def test_one_unfinished_job_per_unique_key(worker, insert):
    def create():
        return control.create_job(worker.connection, "Scripted", {"steps": []},
                                  unique_key="LAN march")
    first = create()
    assert create() == first
    sample_jobs.Scripted(first).run()
    assert create() != first


# Time.

@pytest.mark.parametrize(("text", "zone", "moment"), [
    ("2026-03-01 00:00:00", None, datetime(2026, 3, 1, tzinfo=UTC)),
    ("2026-03-01 00:00:00", "Europe/Madrid", datetime(2026, 2, 28, 23, tzinfo=UTC)),
    ("2026-03-01 00:00:00Z", "Europe/Madrid", datetime(2026, 3, 1, tzinfo=UTC)),
    ("2026-03-01 00:00:00-03:00", "Europe/Madrid", datetime(2026, 3, 1, 3, tzinfo=UTC)),
    # the first of two
    ("2026-10-25 02:30:00", "Europe/Madrid", datetime(2026, 10, 25, 0, 30, tzinfo=UTC)),
])
def test_times_are_in_the_zone_unless_an_offset_follows(monkeypatch, text, zone, moment):
    if zone:
        monkeypatch.setenv("PERFDB_TIMEZONE", zone)
    assert perfdb.parse_time(text) == moment


@pytest.mark.parametrize("text", [
    "2026-03-01", "2026-13-01 00:00:00", "2026-03-01 24:00:01", "0001-01-01 00:00:00+14:00",
    "٢٠٢٦-03-01 00:00:00", "2026-03-01 00:00:00+25:00"])
def test_other_texts_are_no_times(text):
    with pytest.raises((ValueError, OverflowError)):
        perfdb.parse_time(text)


def test_an_hour_the_clocks_skip_is_no_time(monkeypatch):
    monkeypatch.setenv("PERFDB_TIMEZONE", "Europe/Madrid")
    with pytest.raises(ValueError, match="the clocks of Europe/Madrid skip this hour"):
        perfdb.parse_time("2026-03-29 02:30:00")


def test_the_session_has_the_zone(dsn, monkeypatch):
    monkeypatch.setenv("PERFDB_TIMEZONE", "America/Santiago")
    with perfdb.connect(dsn) as connection:
        assert connection.execute("SHOW TimeZone").fetchone() == ("America/Santiago",)


def test_an_unknown_zone_is_named(dsn, monkeypatch):
    monkeypatch.setenv("PERFDB_TIMEZONE", "Mars/Base")
    with pytest.raises(ValueError, match="PERFDB_TIMEZONE='Mars/Base'"):
        perfdb.connect(dsn)


# Steps in a transaction, time limits, retries, cancelling.

def test_a_failed_transactional_step_leaves_its_error_and_nothing_else(insert, steps, conn):
    job = sample_jobs.Transactional(insert("Transactional", steps=["ok", "crash", "error", "ok"]))
    job.run()
    done = [s["id"] for s in steps(job.job_id) if s["state"] == "Finished"]
    assert done == [
        r["step_id"] for r in conn.execute("SELECT step_id FROM trace ORDER BY step_id")]
    assert len(done) == 2


def test_a_transactional_step_that_was_taken_over_leaves_nothing(insert, steps, conn):
    class Robbed(sample_jobs.Transactional):
        def _run_step(self, step_id):
            super()._run_step(step_id)
            conn.execute("UPDATE job_instances SET worker_id = 4711 WHERE id = %s", [self.job_id])

    job = Robbed(insert("Transactional", steps=["ok", "ok"]))
    with pytest.raises(jobs.JobTakenOver):
        job.run()
    assert conn.execute("SELECT count(*) FROM trace").fetchone()["count"] == 0
    assert [s["state"] for s in steps(job.job_id)] == ["Running", "Created"]


def wait_for_an_answer_that_never_comes():
    near, far = socket.socketpair()
    with near, far:
        return near.recv(1)


@pytest.mark.parametrize("hang", [
    pytest.param(lambda job: time.sleep(60), id="in Python"),
    pytest.param(lambda job: job.connection.execute("SELECT pg_sleep(60)"), id="in a query"),
    pytest.param(lambda job: wait_for_an_answer_that_never_comes(), id="in a socket"),
])
def test_a_step_past_its_limit_is_failed_and_the_others_run(insert, steps, conn, hang):
    class Hanging(sample_jobs.Scripted):
        def _run_step(self, step_id):
            if self.step["name"] == "hang":
                try:
                    hang(self)
                except Exception:  # must not swallow the limit
                    return {"swallowed": True}
            return {}

    conn.execute("UPDATE job_types SET step_timeout = '0.2 s' WHERE name = 'Scripted'")
    job = Hanging(insert(steps=["hang", "ok"]))
    job.run()
    first, second = steps(job.job_id)
    assert (first["state"], second["state"]) == ("Failed", "Finished")
    assert first["comment"] == (
        "Timed out: longer than the step limit of 0:00:00.200000 (job_types.step_timeout)")


def test_only_failed_steps_are_tried_again_with_growing_delays(insert, row, steps, conn, worker):
    conn.execute("UPDATE job_types SET max_attempts = 3, retry_delay = '10 min' "
                 "WHERE name = 'Scripted'")
    job_id = insert(steps=["ok", "error"])
    waits, begun = [], []
    for _ in range(2):
        assert jobs.take_up(worker, claim(worker, "Scripted")).run()
        job = row(job_id)
        assert (job["state"], job["worker_id"], job["finished"]) == ("Queued", None, None)
        assert "1 (50.00%) steps failed, attempt" in job["comment"]
        assert [(s["state"], s["comment"]) for s in steps(job_id)] == [
            ("Finished", None), ("Created", "no wind")]
        assert claim(worker, "Scripted") is None  # not before run_after
        waits.append(job["run_after"] - job["last_state_change"])
        begun.append(steps(job_id)[0]["started"])
        conn.execute("UPDATE job_instances SET run_after = now() WHERE id = %s", [job_id])
    jobs.take_up(worker, claim(worker, "Scripted")).run()
    assert (row(job_id)["state"], row(job_id)["attempts"]) == ("Failed", 3)
    assert row(job_id)["comment"] == "1 (50.00%) steps failed"
    assert [round(w / timedelta(minutes=10)) for w in waits] == [1, 2]
    assert begun[0] == begun[1]  # the finished step was not run again


def test_a_created_job_is_cancelled_at_once(insert, row, conn):
    job_id = insert()
    assert control.cancel_job(conn, job_id, "wrong month") == "Failed"
    assert row(job_id)["comment"] == "Cancelled: wrong month, 0 of 0 steps not run"


def test_a_running_job_is_cancelled_before_its_next_step(insert, row, steps, worker):
    class Cancelled(sample_jobs.Scripted):
        def _run_step(self, step_id):
            if self.step["name"] == "stop":
                with perfdb.connect(worker.dsn) as other:
                    assert control.cancel_job(other, self.job_id, "storm") == "Running"

    job = Cancelled(insert(steps=["ok", "stop", "ok", "ok", "ok"]))
    assert job.run() == []
    assert row(job.job_id)["state"] == "Failed"
    assert row(job.job_id)["comment"] == "Cancelled: storm, 3 of 5 steps not run"
    assert [s["state"] for s in steps(job.job_id)] == ["Finished"] * 2 + ["Created"] * 3


def test_an_ended_job_cannot_be_cancelled(insert, worker):
    job_id = insert()
    sample_jobs.Scripted(job_id).run()
    with pytest.raises(ValueError, match=f"job {job_id} cannot be cancelled: it is Finished"):
        control.cancel_job(worker.connection, job_id)


@pytest.mark.parametrize(("every_step", "states"), [
    (False, ["Finished", "Created"]), (True, ["Created", "Created"])])
def test_retry_puts_steps_back(insert, steps, row, worker, every_step, states):
    job_id = insert(steps=["ok", "error"])
    sample_jobs.Scripted(job_id).run()
    assert control.retry_job(worker.connection, job_id, every_step) == "Queued"
    assert [s["state"] for s in steps(job_id)] == states
    assert len(jobs.take_up(worker, claim(worker, "Scripted")).run()) == 1
    assert row(job_id)["state"] == "Failed"


def test_a_refused_job_is_looked_at_anew_by_retry(insert, row, conn, worker):
    job_id = insert(refuse="no")
    with pytest.raises(JobRequestError):
        sample_jobs.Scripted(job_id)
    conn.execute("UPDATE job_instances SET parameters = parameters - 'refuse' WHERE id = %s",
                 [job_id])
    assert control.retry_job(worker.connection, job_id) == "Created"
    sample_jobs.Scripted(job_id).run()
    assert row(job_id)["state"] == "Finished"


def test_a_steps_life_stays_on_its_page(insert, conn, worker):
    job = sample_jobs.Scripted(insert(steps=["ok"] * 300))
    job.run()
    flush_statistics(worker.connection)
    updated = conn.execute("SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_user_tables "
                           "WHERE relname = 'job_steps'").fetchone()
    assert updated["n_tup_upd"] == 600
    assert updated["n_tup_hot_upd"] >= 570  # an index on a changing column would make it 0


# The claim.

@pytest.mark.parametrize("columns", [
    pytest.param("run_after = now() + interval '1 minute'", id="not due yet"),
    pytest.param("job_type_id = (SELECT id FROM job_types WHERE name = 'Noop')",
                 id="type unknown here"),
    pytest.param("state = 'Finished', finished = now()", id="finished"),
    pytest.param("worker_id = 4711", id="somebody has it"),
    pytest.param("description = 'Test of the latest'", id="a test"),
])
def test_claim_leaves_alone(insert, conn, worker, columns):
    job_id = insert()
    conn.execute(f"UPDATE job_instances SET {columns} WHERE id = %s", [job_id])
    assert claim(worker, "Scripted") is None


def test_claim_takes_the_highest_priority_then_the_oldest(insert, conn, worker):
    low, first, second = insert(), insert(), insert()
    conn.execute("UPDATE job_instances SET priority = -1 WHERE id = %s", [low])
    conn.execute("UPDATE job_instances SET description = 'touched' WHERE id = %s",
                 [first])  # moves in the heap
    assert [claim(worker, "Scripted").id for _ in range(3)] == [first, second, low]


def test_claim_does_not_wait_for_a_row_someone_holds(insert, dsn, worker):
    held, free = insert(), insert()
    worker.connection.execute("SET lock_timeout = '1s'")  # waiting would raise LockNotAvailable
    with psycopg.connect(dsn) as other:
        other.execute("SELECT FROM job_instances WHERE id = %s FOR UPDATE", [held])
        assert claim(worker, "Scripted").id == free
