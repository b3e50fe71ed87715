"""Between two statements: every order of them, and the schedules that once went wrong."""

from datetime import UTC, datetime, timedelta

import interleavings
import pytest
import scenes
from gates import Stage
from interleavings import Run
from scenes import LIMITED, ONE, REASON, TWICE, TWO, Job, Scene

import control
import life
import perfdb
import schedules
from worker import Worker, end_overrun


@pytest.fixture
def stage(dsn):
    with Stage(dsn) as stage:
        yield stage


@pytest.fixture
def begin(stage):
    """Begin a play of a scene; after the test it must be found to have ended well."""
    runs = []

    def begin(*args, faults=1, **kwargs):
        scene = Scene("", *args, faults_left=faults, **kwargs)
        scene.prepare(stage.watch)
        runs.append(Run(stage, scene))
        return runs[-1]
    yield begin
    with runs[0] as run:
        for name in run.actors:
            run.until(name)
        assert ends_badly(run) == []


def ends_badly(run):
    """Return what is wrong after a play, whose actors have all gone."""
    problems = run.problems + run.scene.wrong_at_the_end(run)
    rows = run.scene.rows(run.stage.watch)
    return problems + run.scene.wrong(rows, rows, [])


def the_job(run, job_id=1):
    """Return state and comment of a job, and the states of its steps."""
    rows = run.scene.rows(run.stage.watch)
    return (rows.jobs[job_id]["state"], rows.jobs[job_id]["comment"],
            [step["state"] for step in rows.steps.values() if step["job"] == job_id])


@pytest.mark.parametrize("scene", scenes.SMALL, ids=lambda scene: scene.name)
def test_every_order_of_the_statements(stage, scene):
    scene.prepare(stage.watch)
    explored = interleavings.explore(stage, scene)
    print(f"{scene.name}: {explored}")
    assert not explored.problems, "\n  ".join([*explored.problems, "after", *explored.path])
    assert explored.states > 20


def test_a_missing_fence_is_found(stage, monkeypatch):
    """That the test above can fail."""
    fence = "\n       AND worker_id = %(worker_id)s"
    monkeypatch.setattr(life, "END_SQL", life.END_SQL.replace(fence, "", 1))
    scene = Scene("", ONE, "A", acts=("hand 1", "recover 0"))
    scene.prepare(stage.watch)
    assert interleavings.explore(stage, scene).problems


# The schedules that once went wrong, found by holding the requests of real handlers at a proxy.


def test_recovery_looks_at_the_step_it_has_got(begin):
    run = begin(acts=("hand 1",))
    run.until("A", "COMMIT")  # of the first step: its effect and its end are written
    run.until("hand 1")
    run.until("B")            # sees a job Running in nobody's hand
    run.do("A", "go")
    while not run.actors["B"].is_done:
        run.do("B", "go")
        rows = run.scene.rows(run.stage.watch)
        assert list(scenes.wrong_job(rows.jobs[1], rows)) == []
    assert the_job(run)[2][0] == "Finished"


def test_recovery_passes_over_a_job_that_somebody_is_at(begin):
    run = begin(workers="A", acts=("recover 0",))
    run.until("A", "end_step")
    run.do("A", "die")
    with run.stage.watch.transaction():
        run.stage.watch.execute("SELECT FROM job_instances FOR UPDATE")
        run.until("recover 0")
        assert run.actors["recover 0"].is_done
    assert the_job(run)[0] == "Running"


@pytest.mark.parametrize(("started", "attempts"), [("now()", 1), ("'2000-01-01'", 0)])
def test_a_restart_of_the_server_is_not_the_fault_of_the_step(begin, started, attempts):
    """A worker that took its lock before the server's start did not die of its step."""
    run = begin(workers="A", acts=("recover 0",))
    run.until("A", "end_step")
    run.do("A", "die")
    run.stage.watch.execute(f"UPDATE job_workers SET started = {started}")
    run.until("recover 0")
    assert [step["attempts"] for step in run.scene.rows(run.stage.watch).steps.values()] == [
        attempts, 0]


def test_recovery_leaves_a_job_that_is_another_s_by_now(begin):
    run = begin(workers="A", acts=("recover 0", "hand 1", "cancel 1"))
    run.until("A", "end_step")
    run.do("A", "die")
    run.until("recover 0", "LOCK_ORPHAN_SQL")
    run.until("hand 1")
    run.until("cancel 1")
    run.until("recover 0")
    assert the_job(run)[0] == "Running"


def test_a_job_taken_away_and_cancelled_takes_its_step_along(begin):
    run = begin(workers="A", acts=("hand 1", "cancel 1"))
    run.until("A", "end_step")
    run.until("hand 1")
    run.until("cancel 1")
    run.until("A")
    assert the_job(run) == ("Failed", f"{REASON}, 1 of 2 steps not run", ["Failed", "Created"])


@pytest.mark.parametrize("fault", ["cut", "ghost"])
def test_a_connection_lost_at_a_rollback_ends_nobody(begin, fault):
    run = begin((Job(("error", "ok")),), "A")
    run.until("A", "ROLLBACK")
    run.do("A", fault)
    run.until("A")
    assert run.actors["A"].result == 1
    assert the_job(run)[2] == ["Failed", "Finished"]


def test_a_job_taken_away_before_it_is_queued_stays_free(begin):
    """Or two of a type that may have one would run."""
    run = begin((Job(), Job()), acts=("hand 1",), limits=LIMITED)
    run.until("A", "QUEUE_SQL")
    run.until("hand 1")
    run.stage.watch.execute("UPDATE job_instances SET priority = 1 WHERE id = 2")
    run.until("B", "QUEUE_SQL")
    run.do("B", "go")
    run.do("A", "go")
    assert scenes.too_many(run.scene.rows(run.stage.watch)) == []
    assert [the_job(run, job_id)[0] for job_id in (1, 2)] == ["Created", "Running"]


def test_a_job_taken_away_while_it_runs_takes_its_room(begin):
    """Of a type that may have one, until it has ended."""
    run = begin(TWO, "A", acts=("hand 2", "hold 0"), limits=LIMITED)
    run.until("A", "end")
    run.until("hand 2")
    run.until("hold 0")       # looks for a job of the type
    assert scenes.too_many(run.scene.rows(run.stage.watch)) == []
    assert the_job(run, 1)[0] == "Created"


def test_a_worker_ends_every_former_session_of_its_own(begin):
    run = begin(workers="A", faults=2)
    run.until("A", "end_step")
    run.do("A", "ghost")
    run.until("A", "LOCK_SQL")
    run.do("A", "go")
    run.do("A", "ghost")      # has the lock, and has not registered again
    run.until("A")
    assert run.actors["A"].is_done  # and does not wait for its own ghost
    assert the_job(run)[0] == "Finished"
    assert len(run.actors["A"].ids) == 1


def test_the_first_reason_of_a_cancel_stays(begin):
    run = begin(workers="A", acts=("cancel 1",))
    run.until("A", "end_step")
    run.until("cancel 1")
    control.cancel_job(run.stage.watch, 1, "rain")
    assert the_job(run)[1] == REASON


def test_a_key_is_free_when_its_job_is_being_cancelled(begin):
    run = begin((Job(key="k"),), "A", acts=("cancel 1",))
    run.until("A", "end_step")
    run.until("cancel 1")
    connection = run.stage.watch
    connection.execute("SELECT setval(pg_get_serial_sequence('job_instances', 'id'), 100)")
    assert control.create_jobs(
        connection, "Transactional", [{"steps": []}], unique_key="k") == [101]


def test_a_cancelled_job_begins_no_further_step(begin):
    run = begin(workers="A", acts=("cancel 1",))
    run.until("A", "end_step")
    run.until("cancel 1")
    run.until("A")
    assert the_job(run) == ("Failed", f"{REASON}, 1 of 2 steps not run", ["Finished", "Created"])


@pytest.mark.parametrize("attempts", [1, 2])
@pytest.mark.parametrize(("steps", "standing"), [
    (("ok", "ok"), "end"), (("ok", "error"), "COMMIT"), (("ok", "error"), "ROLLBACK")])
def test_a_cancel_while_the_last_step_runs_wins(begin, steps, standing, attempts):
    run = begin((Job(steps),), "A", acts=("cancel 1",), limits=TWICE | {
        "Transactional": (attempts, None)})
    run.until("A", "end_step")
    run.do("A", "go")
    run.until("A", standing)
    run.until("cancel 1")
    run.until("A")
    last = {"ok": "Finished", "error": "Failed"}[steps[-1]]
    assert the_job(run) == ("Failed", f"{REASON}, 0 of 2 steps not run", ["Finished", last])


def test_a_cancel_wins_over_a_stop(begin):
    run = begin(workers="A", acts=("cancel 1",))
    run.until("A", "QUEUE_SQL")
    run.do("A", "stop")
    run.until("A", "hand_back")
    run.until("cancel 1")
    run.until("A")
    assert the_job(run) == ("Failed", f"{REASON}, 1 of 2 steps not run", ["Finished", "Created"])


@pytest.mark.parametrize(("steps", "standing"), [
    (("ok", "ok"), "QUEUE_SQL"), (("ok", 1), "REFUSE_SQL")], ids=["take-up", "refusal"])
def test_a_cancel_wins_over_a_take_up_and_a_refusal(begin, steps, standing):
    run = begin((Job(steps),), "A", acts=("cancel 1",))
    run.until("A", standing)
    run.until("cancel 1")
    run.until("A")
    assert the_job(run)[0] == "Failed"
    assert the_job(run)[1].startswith(REASON)


def test_a_cancel_wins_over_the_begin_of_a_queued_job(begin):
    run = begin(acts=("cancel 1",))
    run.until("A", "QUEUE_SQL")
    run.do("A", "stop")
    run.until("A")
    run.until("B", "BEGIN_SQL")
    run.until("cancel 1")
    run.until("B")
    assert the_job(run) == ("Failed", f"{REASON}, 1 of 2 steps not run", ["Finished", "Created"])


def test_a_job_is_released_by_its_owner_only(begin):
    run = begin(scenes.PLAIN, "A", acts=("hand 2", "hold 0"))
    run.until("A", "end")
    run.do("A", "stop")
    run.do("A", "go")         # has claimed the second job with the end of the first
    assert run.actors["A"].standing == "RELEASE_SQL"
    run.until("hand 2")
    run.until("hold 0")
    run.do("A", "go")
    assert run.scene.rows(run.stage.watch).jobs[2]["owner"] in run.actors["hold 0"].ids


def test_a_cancelled_job_is_released_as_Failed(begin):
    run = begin(scenes.PLAIN, "A", acts=("cancel 2",))
    run.until("A", "end")
    run.do("A", "stop")
    run.do("A", "go")
    run.until("cancel 2")
    run.until("A")
    assert the_job(run, 2) == ("Failed", f"{REASON}, 0 of 0 steps not run", [])


def test_a_connection_lost_in_a_step_is_not_its_fault(begin):
    run = begin(workers="A", fine=True)
    run.until("A", "INSERT INTO trace")
    run.do("A", "cut")
    run.until("A")
    steps = run.scene.rows(run.stage.watch).steps
    assert [(step["state"], step["attempts"]) for step in steps.values()] == [
        ("Finished", 2), ("Finished", 1)]


def test_claims_pass_over_a_type_whose_turn_is_held(begin):
    """A worker that hangs at the COMMIT of its last step has claimed with it."""
    run = begin((Job(), Job(), Job(type_name="Another")), limits=LIMITED)
    run.until("A", "end")
    run.do("A", "go")
    assert run.actors["A"].standing == "COMMIT"
    run.until("B")
    assert not run.actors["B"].is_blocked
    assert the_job(run, 3)[0] == "Finished"


def test_a_claim_waits_for_nobody(begin):
    """Somebody has claimed the first job and not committed: the next one is taken meanwhile."""
    run = begin((Job(), Job()), "A", acts=("hold 0",))
    run.until("hold 0", "COMMIT")
    run.until("A")
    assert run.actors["A"].is_done
    assert the_job(run, 2)[0] == "Finished"


@pytest.mark.parametrize(("age", "ended"), [("30 seconds", []), ("90 seconds", [1])])
@pytest.mark.parametrize("standing", ["QUEUE_SQL", "end_step"], ids=["taking up", "step"])
def test_who_hangs_is_ended_a_minute_past_the_limit(begin, standing, age, ended):
    run = begin(workers="A")
    run.until("A", standing)
    run.actors["A"].may_be_ended = True
    run.stage.watch.execute(scenes.AGE_SQL, {"id": 1, "age": f"1 hour {age}"})
    third = Worker()
    assert end_overrun(third) == ended
    third.close()
    run.until("A")


def test_who_recovers_a_job_is_not_ended_for_it(begin):
    """He holds the lock of the worker that hung and died, for a moment."""
    run = begin(workers="A", acts=("recover 0", "overrun 0"))
    run.until("A", "end_step")
    run.stage.watch.execute(scenes.AGE_SQL, {"id": 1, "age": "2 hours"})
    run.do("A", "die")
    run.until("recover 0", "LOCK_STEP_SQL")
    run.until("overrun 0")
    run.until("recover 0")


def test_who_recovers_a_job_is_not_ended_by_its_worker(begin):
    """Which comes back and ends its own former sessions only."""
    run = begin(workers="A", acts=("recover 0",))
    run.until("A", "end_step")
    run.do("A", "cut")
    run.until("recover 0", "LOCK_STEP_SQL")
    run.until("A")            # waits for its lock
    assert run.actors["A"].standing == "LOCK_SQL"
    run.until("recover 0")


def test_jobs_that_are_due_are_created_by_one(conn, dsn):
    """Who finds a schedule in somebody's hand passes it by, and no window comes twice."""
    control.write_types(conn, ["Transactional"])
    start = datetime.now(UTC) - timedelta(hours=3)
    schedules.add_schedule(conn, "Transactional", {"steps": []}, every="1 hour",
                           start=start.replace(microsecond=0))
    with perfdb.connect(dsn) as one, perfdb.connect(dsn) as other:
        other.execute("SET lock_timeout = '2s'")
        with one.transaction():
            assert len(schedules.create_due_jobs(one)) == 3
            assert schedules.create_due_jobs(other, failed=pytest.fail) == []
        assert schedules.create_due_jobs(other) == []
