"""Whatever a job file does, its job ends with a sentence and the others run."""

import os
import signal

import nasty_jobs
import pytest
from helpers import wait_for

import answers
import control
import handler
import jobs

NASTY = ["--module", "nasty_jobs"]


@pytest.fixture
def ask(conn):
    control.write_types(conn, ["Nasty", "Nasty Transactional", "Own Run"])

    def ask(*steps, type_name="Nasty", **parameters):
        return control.create_job(conn, type_name, {"steps": list(steps)} | parameters)
    return ask


@pytest.fixture
def run_once(dsn):
    """Run what is due in this process, as `handler.py --once` does; return the exit status."""
    return lambda: handler.JobHandler(dsn, once=True).run()


@pytest.fixture
def jobs_are(conn):
    return lambda: [(row["state"], row["comment"]) for row in conn.execute(
        "SELECT state, comment FROM job_instances ORDER BY id")]


@pytest.fixture
def steps_are(conn):
    return lambda: [(row["state"], row["attempts"], row["comment"]) for row in conn.execute(
        "SELECT state, attempts, comment FROM job_steps ORDER BY id")]


@pytest.fixture
def results(conn):
    return lambda: [row["result"] for row in conn.execute(
        "SELECT result FROM job_steps ORDER BY id")]


UNKNOWN = "Unknown error, please check the logs: "


@pytest.mark.parametrize(("deed", "said"), [
    ("unspeakable", UNKNOWN + "Unspeakable (its str() raises ValueError)"),
    ("cancelled task", UNKNOWN + "CancelledError"),
    ("interrupt", UNKNOWN + "KeyboardInterrupt"),
    ("generator exit", UNKNOWN + "GeneratorExit"),
    ("wordless", "JobStepError"),
])
def test_whatever_is_raised_fails_its_step_or_job_alone(ask, run_handler, jobs_are, steps_are,
                                                        deed, said):
    ask(deed, "nothing")
    ask(first=deed)
    ask("nothing")
    run_handler("--once", *NASTY, expect=1)
    assert steps_are() == [("Failed", 1, said), ("Finished", 1, None), ("Finished", 1, None)]
    assert jobs_are() == [("Failed", "1 (50.00%) steps failed"), ("Failed", said),
                          ("Finished", None)]


def test_ctrl_c_without_a_handler_is_nobodys_failure(ask, dsn, steps_are, monkeypatch):
    job = nasty_jobs.Nasty(ask("interrupt"))
    with pytest.raises(KeyboardInterrupt):
        job.run()
    assert steps_are() == [("Running", 1, None)]
    job._worker.close()


def test_a_comment_does_not_grow_with_what_went_wrong(ask, run_once, steps_are):
    ask("endless text")
    assert run_once() == handler.JOBS_FAILED
    assert len(steps_are()[0][2]) < answers.MOST_TEXT + 10


@pytest.mark.parametrize(("deed", "said"), [
    ("nul in a key", "$.deep[0]: the key 'a\\x00b' has characters PostgreSQL cannot store"),
    ("surrogate in a key", "$: the key 'a\\ud800b' has characters PostgreSQL cannot store"),
    ("no repr", "$.power: Unspeakable (its repr() raises ValueError)"),
    ("lists in lists", "more than 1,000,000 values"),
])
def test_a_result_that_cannot_be_stored_is_told(ask, run_once, steps_are, deed, said):
    ask(deed)
    assert run_once() == handler.JOBS_FAILED
    assert said in steps_are()[0][2]
    assert "accepted: None, or a dict with text keys" in steps_are()[0][2]


@pytest.mark.parametrize(("deed", "said"), [
    ("nul in a name", "step 2: name: 'a\\x00b' has characters PostgreSQL cannot store"),
    ("long key", "xxx' is no key of a step"),
])
def test_steps_that_cannot_be_stored_are_told(ask, run_once, jobs_are, deed, said):
    ask(first=deed)
    assert run_once() == handler.JOBS_FAILED
    assert said in jobs_are()[0][1]
    assert len(jobs_are()[0][1]) < 1000


def test_what_a_step_does_to_its_parameters_no_other_sees(ask, run_once, results):
    ask("counting", "counting")
    ask("counting")
    assert run_once() == handler.OK
    assert results() == [{"count": 1}] * 3


# The connection.

CLOSED = ("closed the worker's connection; use `with self.connection.transaction():`, "
          "not `with self.connection:`, which closes it")
UNREAD = "The step left a statement running, or its rows half read"
OPEN = ("left a transaction open; it was rolled back. "
        "Use `with self.connection.transaction():`")


@pytest.mark.parametrize(("type_name", "deed", "said"), [
    ("Nasty", "with connection", f"The step {CLOSED}"),
    ("Nasty Transactional", "close", f"The step {CLOSED}"),
    ("Nasty", "begin", f"The step {OPEN}"),
    ("Nasty", "half read", UNREAD),
    ("Nasty Transactional", "half read", UNREAD),
    ("Nasty", "statement of a thread", UNREAD),
    ("Nasty Transactional", "rollback", "The step ended the transaction it runs in "
     "(_step_in_transaction); leave out COMMIT and ROLLBACK"),
    ("Nasty Transactional", "failure swallowed", "The step went on after a statement that failed, "
     "so all it wrote was rolled back; use `with self.connection.transaction():` around what may "
     "fail"),
])
def test_a_step_that_spoils_the_connection_fails_once(ask, run_once, jobs_are, steps_are,
                                                      type_name, deed, said):
    ask(deed, "nothing", type_name=type_name)
    ask("nothing")
    assert run_once() == handler.JOBS_FAILED
    assert steps_are() == [("Failed", 1, said), ("Finished", 1, None), ("Finished", 1, None)]


@pytest.mark.parametrize(("deed", "said"), [
    ("with connection", f"_create_steps {CLOSED}"),
    ("begin", f"_create_steps {OPEN}"),
    ("autocommit off", f"_create_steps {OPEN}"),
])
def test_so_it_is_where_a_job_is_taken_up(ask, run_once, jobs_are, deed, said):
    ask(first=deed)
    ask("nothing")
    assert run_once() == handler.JOBS_FAILED
    assert jobs_are() == [("Failed", said), ("Finished", None)]


def test_a_handler_hears_of_new_jobs_after_its_connection_was_closed(ask, start_handler, jobs_are):
    start_handler("--poll", "600", *NASTY)
    ask("with connection")
    wait_for(lambda: jobs_are()[0][0] == "Failed")
    ask("nothing")
    wait_for(lambda: jobs_are()[1][0] == "Finished")


def test_a_server_of_the_jobs_own_that_is_down_is_the_jobs_business(ask, run_once, jobs_are):
    ask(first="other server down")
    ask("nothing")
    assert run_once() == handler.JOBS_FAILED
    assert [state for state, _ in jobs_are()] == ["Failed", "Finished"]


def test_a_job_that_cannot_be_taken_up_lets_others_go_first(ask, run_once, conn, jobs_are):
    ask(first="too slow")
    ask("nothing")
    assert run_once() == handler.OK
    assert jobs_are() == [
        ("Created", "Put off after 6 tries: canceling statement due to statement timeout"),
        ("Finished", None)]
    assert conn.execute("SELECT run_after > now() + interval '30 s' AS later "
                        "FROM job_instances ORDER BY id LIMIT 1").fetchone()["later"]


@pytest.mark.parametrize("deed", ["read only", "serializable", "client cursors"])
def test_what_the_driver_was_told_is_gone_before_the_next_job(ask, run_once, results, deed):
    ask("session of job", type_name="Nasty Transactional")
    ask(deed)
    ask("session of job", type_name="Nasty Transactional")
    assert run_once() == handler.OK
    assert results()[0] == results()[2]


def test_a_lock_that_a_job_has_freed_is_taken_again(ask, start_handler, conn, jobs_are):
    start_handler(*NASTY)
    ask("session locks freed")
    wait_for(lambda: jobs_are()[0][0] == "Finished")
    wait_for(lambda: conn.execute(
        "SELECT count(*) AS held FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1"
    ).fetchone()["held"], timeout=5)


# The process.


@pytest.mark.parametrize(("deed", "result"), [("child comes back", {"child": False}),
                                              ("child exits", {"status": 7}),
                                              ("process pool", {"sum": 3})])
def test_a_child_that_a_step_has_forked_is_no_worker(ask, run_handler, results, deed, result):
    ask(deed)
    assert run_handler("--once", *NASTY).stderr == ""
    assert results() == [result]


def test_threads_that_jobs_have_left_do_not_keep_the_handler(ask, run_handler, jobs_are):
    ask("thread left")
    run_handler("--once", *NASTY)
    assert jobs_are() == [("Finished", None)]


def test_signals_reach_the_handler_after_a_job_has_had_them(ask, start_handler, jobs_are):
    process = start_handler("--poll", "600", *NASTY)
    ask("deaf")
    wait_for(lambda: jobs_are()[0][0] == "Finished")
    process.terminate()
    assert process.wait(timeout=10) == handler.OK


def test_an_alarm_of_the_steps_own_is_not_its_limit(ask, run_handler, results):
    ask("own alarm")
    run_handler("--once", *NASTY)
    assert results() == [{"left": True}]


def test_a_closed_stderr_does_not_stop_the_handler(ask, run_handler, jobs_are):
    ask("stderr closed")
    ask("nothing")
    run_handler("--once", *NASTY, expect=1)
    assert jobs_are() == [("Failed", "1 (100.00%) steps failed"), ("Finished", None)]


def test_children_are_seen_to_end_where_sigchld_came_ignored(ask, run_handler, jobs_are):
    ask("nothing")
    ask("child exits")
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        run_handler("--once", "--workers", "2", *NASTY)
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert jobs_are() == [("Finished", None)] * 2


def test_a_job_set_back_to_created_by_hand_is_told_how_to_run_again(ask, run_once, conn,
                                                                    jobs_are):
    job_id = ask("nothing", "wordless")
    assert run_once() == handler.JOBS_FAILED
    conn.execute("UPDATE job_instances SET state = 'Created', started = NULL, finished = NULL")
    assert run_once() == handler.JOBS_FAILED
    assert jobs_are() == [("Failed", "it was Created and yet had steps; to run it again: "
                                     f"jobctl retry {job_id}, with --all every step of it")]
    assert control.retry_job(conn, job_id, every_step=True) == "Queued"


# A `run` of one's own, and modules.


def test_a_run_of_ones_own_need_not_return_anything(ask, run_once, jobs_are):
    ask("nothing", type_name="Own Run")
    ask("nothing")
    assert run_once() == handler.OK
    assert jobs_are() == [("Finished", None)] * 2


def test_a_job_claimed_with_the_end_of_one_that_then_failed_is_not_lost(ask, run_once, conn,
                                                                        jobs_are):
    ask("nothing", type_name="Own Run", fail=True)
    ask("nothing")
    run_once()
    assert jobs_are() == [("Finished", None)] * 2


def test_a_module_that_exits_is_said(run_handler, tmp_path):
    (tmp_path / "leaving.py").write_text("raise SystemExit(0)")
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    done = run_handler("--once", "--module", "leaving", expect=2, env={"PYTHONPATH": path})
    assert "module 'leaving' cannot be loaded: SystemExit: 0" in done.stderr


@pytest.mark.parametrize(("attribute", "value", "said"), [
    ("_name", 5, "_name is 5, not text"),
    ("_name", "", "_name is '', not text"),
    ("_name", "a\0b", "_name is 'a\\x00b', not text"),
    ("_parameters_schema", None, "_parameters_schema is None, not a dict"),
    ("_parameters_schema", True, "_parameters_schema is True, not a dict"),
    ("_parameters_schema", {"required": {"start"}},
     "_parameters_schema.required: set {'start'}"),
])
def test_a_class_that_cannot_be_written_to_job_types_is_refused(attribute, value, said):
    with pytest.raises(ValueError, match="Wrong is no job type") as caught:
        type("Wrong", (jobs.JobInstance,), {"_name": "Wrong", attribute: value})
    assert said in str(caught.value)
    assert "Wrong" not in jobs.JOB_TYPES


@pytest.mark.parametrize(("answer", "problems"), [
    (None, []), (iter(()), []), ("$.a: no", ["$.a: no"]), (iter(["$.a: no"]), ["$.a: no"])])
def test_a_check_of_parameters_may_answer_loosely(monkeypatch, answer, problems):
    monkeypatch.setattr(nasty_jobs.Nasty, "_check_parameters", lambda parameters: answer)
    assert jobs.parameter_problems(nasty_jobs.Nasty, {}) == problems
