"""The scenes that are tried in every order, and what must hold after each statement.

    python tests/scenes.py [SECONDS]

tries the large ones, on a PostgreSQL of its own: two workers that may both be hit, twice, with
operators about. Where there are more orders than can be tried in so many SECONDS (default 15 for
each scene), turnings are taken at random. Ends with status 1 if anything went wrong.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import psycopg  # noqa: E402
from embedded_pg import Server  # noqa: E402
from gates import Actor, Directed, Stage  # noqa: E402
from interleavings import Doer, Run, explore  # noqa: E402
from sample_jobs import Transactional  # noqa: E402

import claims  # noqa: E402
import control  # noqa: E402
import perfdb  # noqa: E402
import tables  # noqa: E402
from worker import MAX_DEATHS, Worker, end_overrun  # noqa: E402
from worker import recover as worker_recover  # noqa: E402

REASON = "Cancelled: wind"


class Plain(Transactional):
    """As Transactional, each step outside a transaction: its effect may come twice."""

    _name = "Plain"
    _step_in_transaction = False


class Another(Transactional):
    """A second type."""

    _name = "Another"


TYPES = ("Transactional", "Plain", "Another")

PREPARE_SQL = """
DROP TABLE IF EXISTS trace;
CREATE TABLE trace (job_id bigint, step_id bigint);
"""

RESET_SQL = """
DELETE FROM trace; DELETE FROM job_steps; DELETE FROM job_instances; DELETE FROM job_workers;
SELECT setval(pg_get_serial_sequence('job_steps', 'id'), 1, false);
"""

INSERT_SQL = """
INSERT INTO job_instances (id, job_type_id, parameters, priority, unique_key)
SELECT %s, id, %s, %s, %s FROM job_types WHERE name = %s
"""

QUEUED_SQL = """
WITH job AS (UPDATE job_instances SET state = 'Queued' WHERE id = %(id)s RETURNING id)
INSERT INTO job_steps (job_instance_id, position, name, parameters)
SELECT id, n, what, jsonb_build_object('what', what)
  FROM job, unnest(%(steps)s::text[]) WITH ORDINALITY AS s(what, n)
"""

# Everything anybody could have changed, without moments; and who holds a worker's lock.
ROWS_SQL = """
WITH lock AS MATERIALIZED (
    SELECT classid::bigint << 32 | objid::bigint AS id, pid
      FROM pg_locks
     WHERE locktype = 'advisory' AND objsubid = 1 AND granted
)
SELECT json_build_object(
    'jobs', (SELECT json_agg(json_build_object(
                'id', j.id, 'state', j.state, 'attempts', j.attempts, 'owner', j.worker_id,
                'cancelled', j.cancel_requested IS NOT NULL, 'comment', j.comment,
                'begun', j.started IS NOT NULL,
                'old', j.last_state_change < now() - interval '1 hour',
                'type', t.name, 'most', t.max_running,
                'max_attempts', t.max_attempts, 'key', j.unique_key) ORDER BY j.id)
               FROM job_instances j JOIN job_types t ON t.id = j.job_type_id),
    'steps', COALESCE((SELECT json_agg(json_build_object(
                'id', id, 'job', job_instance_id, 'state', state, 'attempts', attempts,
                'comment', comment, 'old', started < now() - interval '1 hour') ORDER BY id)
               FROM job_steps), '[]'),
    'effects', (SELECT json_object_agg(step_id, n ORDER BY step_id)
                  FROM (SELECT step_id, count(*) AS n FROM trace GROUP BY step_id) AS e),
    'workers', (SELECT json_agg(id ORDER BY id) FROM job_workers),
    'held', (SELECT json_agg(id ORDER BY id) FROM (SELECT DISTINCT id FROM lock) AS held))::text,
       ARRAY(SELECT ARRAY[id, pid] FROM lock)
"""


class Rows:
    """The rows as they stand committed."""

    def __init__(self, text: str, holders: list[list[int]]) -> None:
        self.text = text
        read = json.loads(text)
        self.jobs = {job["id"]: job for job in read["jobs"] or ()}
        self.steps = {step["id"]: step for step in read["steps"]}
        self.effects = {int(step): n for step, n in (read["effects"] or {}).items()}
        self.workers = set(read["workers"] or ())
        self.holders = holders  # worker id, server process

    def of(self, job_id: int) -> tuple[Any, ...]:
        """Return all that belongs to a job."""
        return self.jobs.get(job_id), [s for s in self.steps.values() if s["job"] == job_id]


@dataclass(frozen=True)
class Job:
    """A job of a scene: what its steps do ("ok", "error"), and how it was asked for."""

    steps: tuple[str, ...] = ("ok", "ok")
    type_name: str = "Transactional"
    key: str | None = None
    priority: int = 0
    queued: bool = False


@dataclass(frozen=True)
class Scene:
    """Who acts, on which jobs, and what may go wrong."""

    name: str
    jobs: tuple[Job, ...] = (Job(),)
    workers: str = "AB"
    faulty: str = "A"            # workers that may be hit
    faults: tuple[str, ...] = ()
    faults_left: int = 0         # how many in one schedule
    fine: bool = False           # stop at statements, too, that commute with all others
    acts: tuple[str, ...] = ()   # operators: "cancel 1", "retry 1", "hand 1"
    limits: dict[str, tuple[int, int | None]] = field(default_factory=dict)  # attempts, running

    def prepare(self, connection: psycopg.Connection) -> None:
        """Make the tables fit; to be done once, before anything else."""
        connection.pgconn.exec_(PREPARE_SQL.encode())
        control.write_types(connection, TYPES)
        for name in TYPES:
            attempts, running = self.limits.get(name, (1, None))
            connection.execute("UPDATE job_types SET max_attempts = %s, max_running = %s, "
                               "retry_delay = '0' WHERE name = %s", [attempts, running, name])

    def reset(self, connection: psycopg.Connection) -> None:
        """Have the jobs asked for and nothing done."""
        connection.pgconn.exec_(RESET_SQL.encode())
        for number, job in enumerate(self.jobs, 1):
            connection.execute(INSERT_SQL, [
                number, json.dumps({"steps": job.steps}), job.priority, job.key, job.type_name])
            if job.queued:
                connection.execute(QUEUED_SQL, {"id": number, "steps": list(job.steps)})

    def rows(self, connection: psycopg.Connection) -> Rows:
        return Rows(*connection.execute(ROWS_SQL).fetchone())

    def actors(self) -> Iterator[tuple[str, Callable[[Actor], Any]]]:
        for name in self.workers:
            yield name, self._work
        for act in self.acts:
            verb, job_id = act.split()
            yield act, lambda _, do=OPERATORS[verb], job_id=int(job_id): operate(do, job_id)

    def _work(self, actor: Actor) -> int:
        actor.handler = Directed("", types=TYPES)
        actor.may_be_ended = any(act.startswith("overrun") for act in self.acts)
        return actor.handler.run()

    # What must hold.

    def wrong(self, before: Rows, after: Rows, doers: list[Doer]) -> list[str]:
        """Return what is wrong with the rows, and with what has become of them."""
        names = " and ".join(doer.actor.name for doer in doers)
        problems = [f"job {job_id} is none of the business of {names}" for job_id in after.jobs
                    if before.of(job_id) != after.of(job_id)
                    and not any(may_write(before, after, job_id, doer) for doer in doers)]
        for doer in doers:
            note_ownership(before, doer)
            problems += forgotten(after, doer.actor)
        problems += [f"step {step['id']} was Finished and is {after.steps[step_id]['state']}"
                     for step_id, step in before.steps.items()
                     if step["state"] == "Finished" and after.steps[step_id]["state"] != "Finished"
                     and "again" not in names]
        return problems + [text for job in after.jobs.values() for text in wrong_job(job, after)] \
            + wrong_effects(after, any(act.startswith("again") for act in self.acts)) \
            + too_many(after)

    def wrong_at_the_end(self, run: Run) -> list[str]:
        """Return what is wrong when everybody has gone and one more handler has run."""
        for actor in run.actors.values():
            if not actor.is_done:
                return [f"{actor.name} waits for ever at {actor.standing}"]
            if actor.handler and not actor.is_dead and actor.result not in (0, 1):
                return [f"{actor.name} ended with status {actor.result}"]
        run.notice()
        cancels = [actor for name, actor in run.actors.items() if name.startswith("cancel")]
        status = Directed("", types=TYPES).run()
        rows = self.rows(run.stage.watch)
        problems = [f"job {job['id']} is stuck: {job}" for job in rows.jobs.values()
                    if job["state"] not in ("Finished", "Failed")]
        problems += [f"the last handler ended with {status}"] * (status not in (0, 1))
        for actor in cancels:
            job = rows.jobs[int(actor.name.split()[1])]
            if actor.result and not self._retried(run) and not (
                    job["state"] == "Failed" and job["comment"].startswith(REASON)):
                problems.append(f"cancelled, and then: {job}")
        return problems + [f"rows of dead workers stay: {rows.workers}"] * bool(rows.workers)

    def _retried(self, run: Run) -> bool:
        return any(name.split()[0] in ("retry", "again") and actor.result
                   for name, actor in run.actors.items())


def operate(do: Callable[[psycopg.Connection, int], Any], job_id: int) -> Any:
    """Do one thing as an operator; return what it returns, None if it is refused."""
    connection = perfdb.connect()
    try:
        return do(connection, job_id)
    except ValueError:
        return None
    finally:
        connection.close()


def recover(connection: psycopg.Connection, _job_id: int, overruns: bool = False) -> Any:
    """Do as a third worker does once in a while."""
    third = Worker()
    if overruns:
        end_overrun(third)
    try:
        return worker_recover(third)
    finally:
        third.close()


def hold(connection: psycopg.Connection, _job_id: int) -> None:
    """Claim a job as a third worker that is slow to commit, and then die."""
    third = Worker()
    with third.connection.transaction():
        claims.claim(third, claims.Wanted.of(TYPES))
    third.close()


# Makes what runs look as if it had begun earlier.
AGE_SQL = """
WITH job AS (
    UPDATE job_instances SET last_state_change = last_state_change - %(age)s::interval
     WHERE id = %(id)s AND worker_id IS NOT NULL RETURNING id
)
UPDATE job_steps SET started = started - %(age)s::interval
 WHERE job_instance_id = %(id)s AND state = 'Running'
"""

OUTSIDERS = ("cancel", "retry", "again", "hand", "age")
OPERATORS = {
    "cancel": lambda connection, job_id: control.cancel_job(connection, job_id, "wind"),
    "retry": control.retry_job,
    "again": lambda connection, job_id: control.retry_job(connection, job_id, True),
    "hand": lambda connection, job_id: connection.execute(
        "UPDATE job_instances SET worker_id = NULL WHERE id = %s AND worker_id IS NOT NULL",
        [job_id]),
    "age": lambda connection, job_id: connection.execute(
        AGE_SQL, {"id": job_id, "age": "2 hours"}),
    "hold": hold,
    "recover": recover,
    "overrun": lambda connection, job_id: recover(connection, job_id, overruns=True),
}


def may_write(before: Rows, after: Rows, job_id: int, doer: Doer) -> bool:
    """Whether somebody may have changed this job and its steps."""
    was, now = before.jobs[job_id], after.jobs[job_id]
    if doer.actor.name.startswith(OUTSIDERS) or was["owner"] in doer.mine \
            or job_id in doer.actor.owned:
        return True
    if was["owner"] is None and now["owner"] in doer.actor.ids:  # a claim
        return before.of(job_id)[1] == after.of(job_id)[1] and was["state"] == now["state"]
    return doer.recovers and (
        only_comments(before.of(job_id), after.of(job_id))  # an overrun
        or (is_orphan(was, before, doer) and (was["owner"] or was["state"] == "Running")))


def is_orphan(job: dict[str, Any], rows: Rows, doer: Doer) -> bool:
    """Whether nobody but perhaps he who recovers it holds the lock of the job's worker."""
    own = doer.actor.session and doer.actor.session.pid
    return not any(owner == job["owner"] and pid != own for owner, pid in rows.holders)


def note_ownership(before: Rows, doer: Doer) -> None:
    """Remember what was ours when a transaction wrote: its COMMIT may come later."""
    actor = doer.actor
    actor.owned = (actor.owned | {job_id for job_id, job in before.jobs.items()
                                  if job["owner"] in doer.mine}
                   if actor.was_in_transaction else set())


def forgotten(rows: Rows, actor: Actor) -> list[str]:
    """Return the jobs a worker has in hand, by the rows, that begins a turn without any."""
    if actor.is_done or actor.is_dead or actor.standing != "LOOK_SQL":
        return []
    *_, job, _worker = actor.seen[0]
    return [f"{actor.name} has forgotten job {job_id}" for job_id, row in rows.jobs.items()
            if row["owner"] in actor.ids[-1:] and job == "None"]


def only_comments(before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
    """Whether nothing but comments of steps has changed."""
    (job, steps), (job_now, steps_now) = before, after
    return job == job_now and [step | {"comment": None} for step in steps] == [
        step | {"comment": None} for step in steps_now]


def wrong_job(job: dict[str, Any], rows: Rows) -> Iterator[str]:
    """Yield what no job may ever look like."""
    steps = [step for step in rows.steps.values() if step["job"] == job["id"]]
    running = [step for step in steps if step["state"] == "Running"]
    if (running and job["state"] != "Running") or len(running) > 1:
        yield f"job {job['id']} is {job['state']} and has {len(running)} steps Running"
    if job["attempts"] > (MAX_DEATHS if job["state"] == "Created" else job["max_attempts"]):
        yield f"job {job['id']} has {job['attempts']} attempts"
    yield from (f"step {step['id']} has {step['attempts']} attempts"
                for step in steps if step["attempts"] > MAX_DEATHS)
    if job["cancelled"] and (job["state"] == "Finished"
                             or not (job["comment"] or "").startswith(REASON)):
        yield f"job {job['id']} is cancelled, and yet: {job}"
    if job["state"] in ("Finished", "Failed") and job["owner"]:
        yield f"job {job['id']} is over and somebody's: {job}"
    if job["state"] == "Finished" and any(step["state"] != "Finished" for step in steps):
        yield f"job {job['id']} is Finished and its steps are not: {steps}"


def wrong_effects(rows: Rows, again: bool = False) -> list[str]:
    """Return the transactional steps whose effect did not come once (twice if asked for again)."""
    return [f"step {step['id']} is {step['state']} and its effect came {n} times"
            for step in rows.steps.values()
            if rows.jobs[step["job"]]["type"] != "Plain"
            and (n := rows.effects.get(step["id"], 0)) != (step["state"] == "Finished")
            and not (again and n == 1 + (step["state"] == "Finished"))]


def too_many(rows: Rows) -> list[str]:
    """Return the types of which more jobs run than may."""
    running: dict[str, list[int]] = {}
    for job in rows.jobs.values():
        if job["most"] is not None and (job["owner"] or job["state"] == "Running"):
            running.setdefault(job["type"], [job["most"]]).append(job["id"])
    return [f"of {name} {len(ids)} run" for name, (most, *ids) in running.items()
            if len(ids) > most]


ONE = (Job(("ok",)),)
FAILING = (Job(("ok", "error")),)
TWO = (Job(("ok",)), Job(("ok",), priority=1))
LIMITED = {"Transactional": (1, 1), "Another": (1, 1)}
TWICE = {"Transactional": (2, None), "Plain": (2, None)}

STOPPED = {"faults": ("stop",), "faults_left": 1}
PLAIN = (Job(("ok",), "Plain"), Job(("ok",), "Plain"))

#: for every run of the tests: one fault or two operators at every point, and who recovers
SMALL = (
    Scene("two workers, two steps"),
    Scene("stopped", **STOPPED),
    Scene("dead", faults=("die",), faults_left=1),
    Scene("cut off", PLAIN[:1], "A", faults=("cut",), faults_left=1, acts=("recover 0",)),
    Scene("cut off before the answer", workers="A", faults=("lose",), faults_left=1),
    Scene("cut off, unnoticed", workers="A", faults=("ghost",), faults_left=1),
    Scene("cancelled", FAILING, "A", acts=("cancel 1",), limits=TWICE),
    Scene("cancelled and stopped", workers="A", acts=("cancel 1",), **STOPPED),
    Scene("tried again", FAILING, "A", acts=("retry 1",)),
    Scene("taken away by hand", ONE, "A", acts=("hand 1", "recover 0")),
    Scene("taken away between steps", workers="A", acts=("hand 1",)),
    Scene("taken away and cancelled", ONE, "A", acts=("hand 1", "cancel 1")),
    Scene("taken away and stopped", workers="A", acts=("hand 1",), **STOPPED),
    Scene("taken away before another try", (Job(("error",)),), "A", acts=("hand 1",),
          limits=TWICE),
    Scene("taken away with another to come", PLAIN, "A", acts=("hand 1",)),
    Scene("refused", (Job(("ok", 1)),), "A", acts=("hand 1", "cancel 1")),
    Scene("resumed", (Job(("ok",), queued=True),), "A", acts=("hand 1",)),
    Scene("two types of one each", (Job(("ok",)), Job(("ok",), "Another")), limits=LIMITED),
    Scene("one of two at once", TWO, limits=LIMITED),
    Scene("a claim that hangs", TWO, "A", acts=("hold 0",), limits=LIMITED),
)

MANY = ("lose", "cut", "ghost", "die", "stop")
HIT = {"faulty": "AB", "faults": MANY}

#: for make chaos: what the small ones have, together
LARGE = (
    Scene("two workers, hit once", **HIT, faults_left=1),
    Scene("resumed and cancelled", (Job(queued=True),), acts=("hand 1", "cancel 1")),
    Scene("two workers, hit twice", **HIT, faults_left=2),
    Scene("hit between any two statements", **HIT, faults_left=1, fine=True),
    Scene("outside a transaction", (Job(("ok", "error", "ok"), "Plain"),), **HIT, faults_left=1,
          limits=TWICE),
    Scene("tried again and cancelled", FAILING, **HIT, faults_left=1, limits=TWICE,
          acts=("cancel 1", "retry 1")),
    Scene("taken away and cancelled, hit once", **HIT, faults_left=1, acts=("hand 1", "cancel 1")),
    Scene("a key asked for again", (Job(("error",), key="k"), Job(("ok",), "Plain")), **HIT,
          faults_left=1, acts=("cancel 1", "again 1")),
    Scene("taken away of a limited type", TWO, "A", acts=("hand 2", "hold 0"), limits=LIMITED),
    Scene("two of a limited type", TWO, **HIT, faults_left=1, limits=LIMITED,
          acts=("hand 1", "hand 2")),
    Scene("two limited types", (*TWO, Job(type_name="Another")), **HIT, faults_left=1,
          limits=LIMITED, acts=("cancel 2", "recover 0")),
    Scene("hangs", ONE, "A", faults=("die", "cut"), faults_left=1,
          acts=("age 1", "overrun 1", "recover 0")),
)


def main() -> int:
    seconds = float(sys.argv[1]) if sys.argv[1:] else 15.0
    rows, problems = [], []
    with Server({"fsync": "off"}) as server:
        os.environ["PERFDB_DSN"] = server.dsn()
        with psycopg.connect(server.dsn(), autocommit=True) as connection:
            connection.execute((ROOT / "schema.sql").read_text())
        for scene in (*SMALL, *LARGE):
            with Stage(server.dsn()) as stage:
                scene.prepare(stage.watch)
                explored = explore(stage, scene, time.monotonic() + seconds, random.Random(0))
            rows.append([scene.name, explored.states, explored.transitions, explored.schedules,
                         "all" if explored.is_complete else "some", len(explored.problems)])
            if explored.problems:
                problems += [f"{scene.name}: {explored.problems}, after", *explored.path]
            print(f"  {scene.name}: {explored}", file=sys.stderr, flush=True)
    print(tables.table(
        ["scene", "states", "transitions", "schedules", "orders", "problems"], rows))
    print("\n  ".join(problems))
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main())
