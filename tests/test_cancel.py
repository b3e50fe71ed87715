"""An accepted cancel ends the job Failed with its reason, whatever else happens to it."""

import pytest
import sample_jobs  # noqa: F401  registers its types

import control
import handler
from worker import Worker, recover

REASON = "Cancelled: wrong park, "


@pytest.fixture
def ask(conn):
    control.write_types(conn, ["Noop", "Scripted", "Transactional"])
    conn.execute("CREATE TABLE trace (job_id bigint, step_id bigint)")

    def ask(*steps, type_name="Scripted", **options):
        return control.create_job(conn, type_name, {"steps": list(steps)}, **options)
    return ask


@pytest.fixture
def run_once(dsn):
    return lambda: handler.JobHandler(dsn, once=True).run()


@pytest.fixture
def job(conn):
    def job(job_id):
        row = conn.execute("SELECT state, comment FROM job_instances WHERE id = %s",
                           [job_id]).fetchone()
        return row["state"], row["comment"]
    return job


@pytest.fixture
def states(conn):
    return lambda: [row["state"] for row in
                    conn.execute("SELECT state FROM job_steps ORDER BY id")]


@pytest.mark.parametrize("type_name", ["Scripted", "Transactional"])
@pytest.mark.parametrize(("steps", "left", "ended"), [
    pytest.param(["cancel", "ok", "ok"], "2 of 3", ["Finished", "Created", "Created"],
                 id="between two steps"),
    pytest.param(["cancel then fail", "ok"], "1 of 2", ["Failed", "Created"],
                 id="as a step fails"),
    pytest.param(["ok", "cancel"], "0 of 2", ["Finished", "Finished"], id="in the last step"),
    pytest.param(["ok", "cancel then fail"], "0 of 2", ["Finished", "Failed"],
                 id="as the last step fails"),
])
@pytest.mark.parametrize("attempts", [1, 3])
def test_it_wins_over_the_end_of_a_step(ask, run_once, conn, job, states, type_name, steps, left,
                                        ended, attempts):
    conn.execute("UPDATE job_types SET max_attempts = %s", [attempts])
    job_id = ask(*steps, type_name=type_name)
    behind = ask("ok")
    assert run_once() == handler.JOBS_FAILED
    assert job(job_id) == ("Failed", f"{REASON}{left} steps not run")
    assert states() == [*ended, "Finished"]
    assert job(behind) == ("Finished", None)


@pytest.mark.parametrize("type_name", ["Scripted", "Transactional"])
def test_it_wins_over_a_hand_back(ask, run_handler, job, states, type_name):
    job_id = ask("cancel and stop", "ok", type_name=type_name)
    run_handler("--once", "--module", "sample_jobs", expect=1)
    assert job(job_id) == ("Failed", f"{REASON}1 of 2 steps not run")
    assert states() == ["Finished", "Created"]


def test_it_wins_over_a_recovery(ask, dsn, conn, job, states):
    job_id = ask("ok", "ok")
    conn.execute("UPDATE job_instances SET state = 'Running', started = now(), worker_id = 4711")
    conn.execute("INSERT INTO job_steps (job_instance_id, position, state, started, attempts) "
                 "VALUES (%s, 1, 'Running', now(), 1), (%s, 2, 'Created', NULL, 0)",
                 [job_id, job_id])
    assert control.cancel_job(conn, job_id, "wrong park") == "Running"
    neighbour = Worker(dsn)
    assert recover(neighbour) == {job_id: "Failed"}
    neighbour.close()
    assert job(job_id) == ("Failed", f"{REASON}1 of 2 steps not run")
    assert states() == ["Failed", "Created"]


def test_a_step_of_a_job_taken_away_and_cancelled_ends_with_it(ask, run_once, job, states):
    job_id = ask("taken away", "ok")
    cancelled = ask("cancel, taken away", "ok")
    run_once()
    run_once()  # recovery finds what is Running in nobody's hand
    assert job(cancelled) == ("Failed", f"{REASON}1 of 2 steps not run")
    assert job(job_id)[0] in ("Queued", "Finished", "Running")
    assert states()[2:] == ["Failed", "Created"]


def test_its_unique_key_is_free_at_once(ask, conn, dsn, job):
    first = ask("ok", unique_key="a")
    assert ask("ok", unique_key="a") == first
    conn.execute("UPDATE job_instances SET worker_id = 4711 WHERE id = %s", [first])
    assert control.cancel_job(conn, first, "wrong park") == "Created"  # in hand: not ended yet
    second = ask("ok", unique_key="a")
    assert second != first
    neighbour = Worker(dsn)
    recover(neighbour)
    neighbour.close()
    assert job(first) == ("Failed", f"{REASON}0 of 0 steps not run")
    with pytest.raises(ValueError, match="another unfinished job has its unique_key"):
        control.retry_job(conn, first)


def test_the_first_reason_stays(ask, conn, job):
    job_id = ask("ok")
    conn.execute("UPDATE job_instances SET worker_id = 4711")
    control.cancel_job(conn, job_id, "wrong park")
    control.cancel_job(conn, job_id, "changed my mind")
    assert job(job_id) == ("Created", "Cancelled: wrong park")


def test_a_retry_gives_all_attempts_again(ask, run_once, conn, job):
    conn.execute("UPDATE job_types SET max_attempts = 2, retry_delay = '0'")
    job_id = ask("error")
    run_once()
    assert job(job_id)[0] == "Failed"
    control.retry_job(conn, job_id)
    assert conn.execute("SELECT attempts FROM job_instances").fetchone()["attempts"] == 0
    run_once()
    assert conn.execute("SELECT attempts FROM job_instances").fetchone()["attempts"] == 2
