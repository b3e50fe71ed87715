"""Taking a job up is guarded as a step is; answers are looked at; a session is as it was."""

from pathlib import Path

import pytest
import sample_jobs  # noqa: F401  registers its types
from helpers import wait_for

import control
import handler

SAMPLES = ["--module", "sample_jobs"]


@pytest.fixture
def ask(conn):
    """Ask for a job of a sample type."""
    control.write_types(conn, ["Noop", "Taken Up", "Answers", "Meddling", "Starts"])

    def ask(type_name, **parameters):
        return control.create_job(conn, type_name, parameters)
    return ask


@pytest.fixture
def row(conn):
    return lambda job_id: conn.execute(
        "SELECT state, comment, attempts, worker_id FROM job_instances WHERE id = %s",
        [job_id]).fetchone()


@pytest.fixture
def run_once(dsn):
    """Run what is due in this process, as `handler.py --once` does; return the exit status."""
    return lambda: handler.JobHandler(dsn, once=True).run()


@pytest.mark.parametrize(("answer", "said"), [
    ([{"id": 1, "name": "LAN-01"}], "step 1: 'id' is no key of a step"),
    ([{}, {"name": "March", "month": 3}], "step 2: 'month' is no key of a step"),
    (None, "NoneType, not a list: None"),
    ({"name": "LAN-01"}, "dict, not a list: {'name': 'LAN-01'}"),
    (["LAN-01"], "step 1: str, not a dict: 'LAN-01'"),
    ([{"name": 7}], "step 1: name is 7, not text"),
    ([{"object_id": "LAN-01"}], "step 1: object_id is 'LAN-01', not an int"),
    ([{"object_id": 2**40}], "step 1: object_id is 1099511627776, not an int"),
    ([{"parameters": [1]}], "step 1: parameters is [1], not a dict"),
])
def test_steps_of_another_shape_are_refused_with_what_is_accepted(ask, run_once, conn, row,
                                                                  answer, said):
    other = ask("Noop")
    job_id = ask("Taken Up", do="answer", answer=answer)
    assert run_once() == handler.JOBS_FAILED
    assert said in row(job_id)["comment"]
    assert "a step is a dict of name (text), object_id (an int)" in row(job_id)["comment"]
    assert (row(job_id)["state"], row(other)["state"]) == ("Failed", "Finished")
    assert conn.execute("SELECT id, job_instance_id, name FROM job_steps").fetchall() == [
        {"id": 1, "job_instance_id": other, "name": "step 1"}]


@pytest.mark.parametrize(("step", "said"), [
    ("decimal", "$.power: Decimal Decimal('1.5')"),
    ("time", "$.at[0]: datetime datetime.datetime(2026, 3, 1, 0, 0)"),
    ("nan", "$.deep.mean: nan is no number in JSON; use None"),
    ("set", "$.names: set {1}"),
    ("list", "list, not a dict: [1]"),
    ("key", "$: the key 7 is int, not text"),
    ("nul", "$.text: 'a\\x00' has characters PostgreSQL cannot store"),
    ("huge", "$.n: an int of more than 1,200 digits"),
])
def test_a_result_that_is_no_json_is_told_by_key_and_type(ask, run_once, conn, step, said):
    ask("Answers", steps=[step])
    assert run_once() == handler.JOBS_FAILED
    comment = conn.execute("SELECT comment FROM job_steps").fetchone()["comment"]
    assert said in comment
    assert "accepted: None, or a dict with text keys" in comment


@pytest.mark.parametrize("parameters", ['{"n": ' + "7" * 5000 + "}",
                                        '{"a": ' + "[" * 1500 + "]" * 1500 + "}"],
                         ids=["5,000 digits", "1,500 deep"])
def test_parameters_that_cannot_be_loaded_fail_their_job_alone(ask, run_handler, conn, row,
                                                               parameters):
    bad = conn.execute("INSERT INTO job_instances (job_type_id, parameters) "
                       "SELECT id, %s FROM job_types "
                       "WHERE name = 'Noop' RETURNING id", [parameters]).fetchone()["id"]
    good = ask("Noop")
    run_handler("--once", *SAMPLES, expect=1)
    assert (row(bad)["state"], row(good)["state"]) == ("Failed", "Finished")
    assert "digits" in row(bad)["comment"] or "deeper" in row(bad)["comment"]


def test_a_job_that_kills_its_worker_when_taken_up_ends_after_three(ask, run_handler, row):
    deadly, behind = ask("Taken Up", do="kill"), ask("Noop")
    for deaths in (0, 1, 2):
        assert row(deadly)["attempts"] == max(0, deaths - 1)  # a death is counted when it is found
        run_handler("--once", *SAMPLES, expect=-9)
    run_handler("--once", *SAMPLES, expect=1)
    assert (row(deadly)["state"], row(behind)["state"]) == ("Failed", "Finished")
    assert row(deadly)["comment"].startswith("Its worker died 3 times while it took the job up")


def test_sys_exit_when_taken_up_fails_the_job(ask, run_handler, row):
    leaving, behind = ask("Taken Up", do="exit"), ask("Noop")
    run_handler("--once", *SAMPLES, expect=1)
    assert row(leaving)["comment"] == "Unknown error, please check the logs: 7"
    assert (row(leaving)["state"], row(behind)["state"]) == ("Failed", "Finished")


def test_taking_up_has_the_limit_of_a_step(ask, run_handler, conn, row):
    hanging, behind = ask("Taken Up", do="hang"), ask("Noop")
    conn.execute("UPDATE job_types SET step_timeout = '0.2 s' WHERE name = 'Taken Up'")
    run_handler("--once", *SAMPLES, expect=1)
    assert (row(hanging)["state"], row(behind)["state"]) == ("Failed", "Finished")
    assert row(hanging)["comment"].startswith("Timed out: longer than the step limit of 0:00:00.2")


def test_a_cancel_while_taken_up_counts(ask, run_handler, start_handler, conn, row):
    job_id = ask("Taken Up", do="hang")
    conn.execute("UPDATE job_types SET step_timeout = '1 s' WHERE name = 'Taken Up'")
    process = start_handler("--once", *SAMPLES)
    wait_for(lambda: row(job_id)["worker_id"])
    assert control.cancel_job(conn, job_id, "wrong park") == "Created"
    assert process.wait(timeout=10) == 1
    assert (row(job_id)["state"], row(job_id)["comment"]) == (
        "Failed", "Cancelled: wrong park, 0 of 0 steps not run")


def test_no_space_while_taken_up_is_not_the_jobs_fault(ask, run_handler, conn, row):
    conn.execute("CREATE SEQUENCE tries")
    job_id = ask("Taken Up", do="disk full")
    done = run_handler("--once", *SAMPLES)
    assert (row(job_id)["state"], row(job_id)["attempts"]) == ("Finished", 1)
    assert done.stderr.count("the database failed, trying again") == 1  # not at each try


def test_processes_of_a_step_end_with_its_time_limit(ask, run_handler, conn, tmp_path):
    ask("Starts", file=str(tmp_path / "pid"))
    conn.execute("UPDATE job_types SET step_timeout = '0.5 s' WHERE name = 'Starts'")
    run_handler("--once", *SAMPLES, expect=1)
    pid = int((tmp_path / "pid").read_text())
    wait_for(lambda: not Path(f"/proc/{pid}").exists(), timeout=5,
             what="the step's processes to end")


# What a step changes in its session.

SHOW = "SELECT current_setting('search_path'), current_setting('statement_timeout'), current_user"


@pytest.mark.parametrize("change", [
    "SET search_path TO pg_catalog", "SET statement_timeout = '3 s'", "SET ROLE pg_monitor",
    "SET SESSION AUTHORIZATION pg_monitor", "autocommit off", "rows as dicts",
    "SET lock_timeout = 1", "SET default_transaction_read_only = on",
    "SET IntervalStyle = iso_8601", "SET TimeZone = 'Asia/Tokyo'"])
def test_what_a_step_changes_is_gone_before_the_next(ask, run_once, conn, change):
    ask("Meddling", steps=[SHOW])
    ask("Meddling", steps=[change, SHOW])
    ask("Meddling", steps=[SHOW])
    assert run_once() == handler.OK
    shown = conn.execute(
        "SELECT result->>'row' AS row FROM job_steps WHERE result IS NOT NULL").fetchall()
    assert len({one["row"] for one in shown}) == 1
    assert len(shown) == 3


def test_temporary_tables_and_locks_are_gone_before_the_next_job(ask, run_once, conn):
    held = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND pid = pg_backend_pid()"
    ask("Meddling", steps=["CREATE TEMP TABLE mine (n int)", "SELECT pg_advisory_lock(77)",
                           "SELECT pg_advisory_lock(7, 7)", "SELECT count(*) FROM mine", held])
    ask("Meddling", steps=["SELECT to_regclass('mine')", held])
    assert run_once() == handler.OK
    rows = [one["row"] for one in conn.execute(
        "SELECT result->>'row' AS row FROM job_steps "
        "WHERE result IS NOT NULL ORDER BY id").fetchall()]
    # of one job, the other: its own lock is left
    assert rows[-4:] == ["(0,)", "(3,)", "(None,)", "(1,)"]


def test_the_session_says_what_runs_after_a_step_used_it(ask, run_once, conn):
    job_id = ask("Meddling", steps=["SELECT 1", "SELECT current_setting('application_name')"])
    assert run_once() == handler.OK
    assert conn.execute(
        "SELECT result->>'row' AS row FROM job_steps ORDER BY id DESC LIMIT 1").fetchone()[
        "row"] == f"('job {job_id} Meddling',)"
