"""Jobs owed window by window: which windows are due, adding, listing and backfilling schedules.

Windows begin at first_start + n * every, in the calendar of the session's zone; a window ends
where the next begins (job_schedule_window_end in schema.sql).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import psycopg
from psycopg.types.json import Jsonb

from control import check_request, unknown_type
from parameters import JobRequestError
from perfdb import query

log = logging.getLogger(__name__)

MOST_WINDOWS = 1000  # of a schedule at once: the next look, a second later, makes the next

# Asked every second by idle workers: nothing is written, so it takes no transaction id.
ANY_DUE = """EXISTS (
    SELECT FROM job_schedules
     WHERE enabled
       AND job_schedule_window_end(first_start, every, next_start) + delay <= now())"""

DUE_SQL = """
SELECT id
  FROM job_schedules
 WHERE enabled
   AND job_schedule_window_end(first_start, every, next_start) + delay <= COALESCE(%(now)s, now())
 ORDER BY id
"""

TIME_FORMAT = "'YYYY-MM-DD HH24:MI:SSTZH:TZM'"  # with the offset: an hour may come twice

# One job for every window that is over and has none. The schedule's row is locked meanwhile, and a
# second handler passes it by (SKIP LOCKED), so no window comes twice; next_start moves in the same
# statement, so none is lost. A window that a backfill was quicker with is passed over. run_after
# is when it was due: whoever catches up runs the oldest window first, of whatever schedule.
CREATE_DUE_SQL = f"""
WITH RECURSIVE schedule AS MATERIALIZED (
    SELECT *
      FROM job_schedules
     WHERE id = %(id)s
       AND enabled
       FOR UPDATE SKIP LOCKED
), period AS (
    SELECT next_start AS start_time,
           job_schedule_window_end(first_start, every, next_start) AS end_time, 1 AS n
      FROM schedule
     UNION ALL
    SELECT p.end_time, job_schedule_window_end(s.first_start, s.every, p.end_time), p.n + 1
      FROM period p, schedule s
     WHERE p.end_time + s.delay <= COALESCE(%(now)s, now())
       AND p.n < %(most)s
), due AS (
    SELECT p.start_time, p.end_time, p.end_time + s.delay AS due_since
      FROM period p, schedule s
     WHERE p.end_time + s.delay <= COALESCE(%(now)s, now())
), moved AS (
    UPDATE job_schedules s
       SET next_start = (SELECT max(end_time) FROM due)
      FROM schedule
     WHERE s.id = schedule.id
       AND EXISTS (SELECT FROM due)
)
INSERT INTO job_instances (job_type_id, description, parameters, run_after,
                           schedule_id, window_start)
SELECT s.job_type_id, s.description,
       s.parameters || pg_catalog.jsonb_build_object(
           'start', to_char(due.start_time, {TIME_FORMAT}),
           'end', to_char(due.end_time, {TIME_FORMAT})),
       due.due_since, s.id, due.start_time
  FROM due, schedule s
 WHERE NOT EXISTS (SELECT FROM job_instances j
                    WHERE j.schedule_id = s.id AND j.window_start = due.start_time)
 ORDER BY due.start_time
ON CONFLICT (schedule_id, window_start)
      WHERE schedule_id IS NOT NULL AND state IN ('Created', 'Queued', 'Running') DO NOTHING
RETURNING id
"""  # noqa: S608


def warn(schedule_id: int, exc: psycopg.Error) -> None:
    log.warning("schedule=%d cannot create its jobs: %s", schedule_id, str(exc).strip())


def create_due_jobs(connection: psycopg.Connection, now: datetime | None = None,
                    failed: Callable[[int, psycopg.Error], None] = warn) -> list[int]:
    """Create the jobs that schedules owe at `now` (the server's clock) and return their ids.

    At most `MOST_WINDOWS` of a schedule. A schedule whose jobs the database refuses is told to
    `failed` and does not stop the others; raise `psycopg.Error` only if the connection is lost.
    """
    ids: list[int] = []
    for (schedule_id,) in query(connection, DUE_SQL, {"now": now}):
        params = {"id": schedule_id, "now": now, "most": MOST_WINDOWS}
        try:
            created = [job_id for (job_id,) in query(connection, CREATE_DUE_SQL, params)]
        except psycopg.Error as exc:
            if connection.closed:
                raise
            failed(schedule_id, exc)
            continue
        for job_id in created:
            log.info("job=%d created by schedule %d", job_id, schedule_id)
        ids += created
    return ids


ADD_SCHEDULE_SQL = f"""
INSERT INTO job_schedules (job_type_id, description, parameters, every, first_start, next_start,
                           delay)
SELECT id, %(description)s, %(parameters)s, %(every)s::interval, %(start)s, %(start)s,
       %(delay)s::interval
  FROM job_types
 WHERE name = %(type)s
RETURNING id, to_char(first_start, {TIME_FORMAT}),
          to_char(job_schedule_window_end(first_start, every, first_start), {TIME_FORMAT})
"""  # noqa: S608

# What the CHECKs of job_schedules refuse, said to people.
RULES = {
    "schedule_every_is_sensible": "every {every!r} is not between 1 second and 100 years",
    "schedule_every_makes_windows":
        "every {every!r} makes no windows: write whole seconds, minutes, hours, days, weeks, "
        "months or years, none of them negative, e.g. '1 day' or '15 minutes'",
    "schedule_delay_is_sensible": "delay {delay!r} is not between 0 and 100 years",
    "schedule_next_start_is_sensible": "start {start} is not in the years 1900 to 2999",
}


def add_schedule(connection: psycopg.Connection, type_name: str, parameters: Mapping[str, Any], *,
                 every: str, start: datetime, delay: str = "0s", description: str = "") -> int:
    """Owe a job for every window of time from `start` on, and return the schedule's id.

    `every` and `delay` are intervals as PostgreSQL reads them. Raise `JobRequestError` if they
    make no windows, the type is unknown, or the parameters, with a window's start and end, do not
    fit it; nothing is added then.
    """
    given = {"type": type_name, "description": description, "every": every, "delay": delay,
             "start": start, "parameters": Jsonb(dict(parameters))}
    with connection.transaction():
        try:
            rows = query(connection, ADD_SCHEDULE_SQL, given)
        except psycopg.errors.CheckViolation as exc:
            if exc.diag.constraint_name not in RULES:
                raise
            raise JobRequestError(RULES[exc.diag.constraint_name].format(**given)) from None
        except (psycopg.errors.InvalidDatetimeFormat, psycopg.errors.DatetimeFieldOverflow,
                psycopg.errors.IntervalFieldOverflow) as exc:
            raise JobRequestError(f"every {every!r}, delay {delay!r}: {exc.diag.message_primary}; "
                                  "write e.g. '1 day' or '15 minutes'") from None
        if not rows:
            raise JobRequestError(unknown_type(connection, type_name))
        schedule_id, first_start, first_end = rows[0]
        window = {"start": first_start, "end": first_end}
        check_request(connection, type_name, [{**parameters, **window}])
    return schedule_id


# The job of the latest window, and of those the newest: what jobctl and doctor look at.
SCHEDULES_SQL = """
SELECT s.id, t.name AS job_type, s.description, s.parameters, s.every::text AS every,
       s.first_start, s.next_start, s.delay::text AS delay, s.enabled,
       j.id AS last_job_id, j.state AS last_job_state
  FROM job_schedules s
  JOIN job_types t ON t.id = s.job_type_id
  LEFT JOIN LATERAL (
        SELECT id, state
          FROM job_instances
         WHERE schedule_id = s.id
           AND window_start IS NOT NULL
         ORDER BY window_start DESC, id DESC
         LIMIT 1) j ON true
 ORDER BY s.id
"""

CHANGE_SCHEDULE_SQL = {
    "enable": "UPDATE job_schedules SET enabled = true WHERE id = %(id)s RETURNING id",
    "disable": "UPDATE job_schedules SET enabled = false WHERE id = %(id)s RETURNING id",
    "remove": "DELETE FROM job_schedules WHERE id = %(id)s RETURNING id",
}


# -------------------------------------------------------------------------------------- backfill

# The windows that begin in [from, to), each with its jobs. Jobs of version 1 have no window_start,
# but the same text in their parameters.
WINDOWS_SQL = f"""
WITH RECURSIVE schedule AS (
    SELECT * FROM job_schedules WHERE id = %(id)s
), period AS (
    SELECT NULL::timestamptz AS start_time, 0 AS n,
           job_schedule_window_end(first_start, every,
                                   %(from)s::timestamptz - interval '1 microsecond') AS end_time
      FROM schedule
     UNION ALL
    SELECT p.end_time, p.n + 1, job_schedule_window_end(s.first_start, s.every, p.end_time)
      FROM period p, schedule s
     WHERE p.end_time < %(to)s
       AND p.n <= %(most)s
), job AS (
    SELECT COALESCE(to_char(window_start, {TIME_FORMAT}), parameters ->> 'start'::text) AS start,
           string_agg(id::text || ' ' || state, ', ' ORDER BY id) AS jobs,
           pg_catalog.array_agg(state) AS states
      FROM job_instances
     WHERE schedule_id = %(id)s
       AND (window_start IS NULL OR window_start >= %(from)s AND window_start < %(to)s)
     GROUP BY 1
)
SELECT p.start_time, p.end_time, COALESCE(job.jobs, ''), COALESCE(job.states, '{{}}'),
       p.end_time + s.delay <= now()
  FROM schedule s, period p
  LEFT JOIN job ON job.start = to_char(p.start_time, {TIME_FORMAT})
 WHERE p.n > 0
 ORDER BY p.n
"""  # noqa: S608


@dataclass(frozen=True, slots=True)
class Window:
    """A window of a schedule, its jobs, whether a backfill creates one more, and why (not)."""

    start: datetime
    end: datetime
    jobs: str
    create: bool
    why: str


def windows(connection: psycopg.Connection, schedule_id: int, from_time: datetime,
            to_time: datetime, which: str = "missing") -> list[Window]:
    """Return the windows of a schedule that begin in [from_time, to_time), in their order.

    `which` is what a backfill creates jobs for: "missing", windows that have no job; "failed",
    those too that have none that Finished; "all". Raise `JobRequestError` if there is no such
    schedule, or the period is empty or has more than `MOST_WINDOWS` windows.
    """
    if not query(connection, "SELECT id FROM job_schedules WHERE id = %s", [schedule_id]):
        raise JobRequestError(f"there is no schedule {schedule_id}; "
                              "python jobctl.py schedule list shows them")
    if from_time >= to_time:
        raise JobRequestError(f"--to {to_time} is not after --from {from_time}")
    rows = query(connection, WINDOWS_SQL, {"id": schedule_id, "from": from_time, "to": to_time,
                                           "most": MOST_WINDOWS})
    if len(rows) > MOST_WINDOWS:
        raise JobRequestError(f"these are more than {MOST_WINDOWS} windows; do them in parts, "
                              f"the first with --to '{_text(rows[MOST_WINDOWS][0])}'")
    return [Window(start, end, jobs, *_decide(set(states), is_over, which))
            for start, end, jobs, states, is_over in rows]


def _decide(states: set[str], is_over: bool, which: str) -> tuple[bool, str]:
    """Return whether a window whose jobs are in these states gets one more, and why."""
    if not is_over:
        return False, "is not over yet"
    if states & {"Created", "Queued", "Running"}:
        return False, "has a job that has not ended"
    if not states:
        return True, "has no job"
    if "Finished" in states:
        return which == "all", "has a job that Finished"
    return which != "missing", "has no job that Finished"


def _text(moment: datetime) -> str:
    return moment.isoformat(" ", "seconds")


# Held to the end of the transaction: meanwhile neither the schedule nor a second backfill creates
# jobs, so what the windows were found to lack they still lack.
LOCK_SCHEDULE_SQL = """
SELECT t.name, s.parameters
  FROM job_schedules s
  JOIN job_types t ON t.id = s.job_type_id
 WHERE s.id = %(id)s
   FOR UPDATE OF s
"""

BACKFILL_SQL = f"""
INSERT INTO job_instances (job_type_id, description, parameters, schedule_id, window_start)
SELECT s.job_type_id, s.description,
       s.parameters || pg_catalog.jsonb_build_object(
           'start', to_char(w.start_time, {TIME_FORMAT}),
           'end', to_char(w.end_time, {TIME_FORMAT})),
       s.id, w.start_time
  FROM job_schedules s,
       unnest(%(starts)s::timestamptz[], %(ends)s::timestamptz[]) AS w (start_time, end_time)
 WHERE s.id = %(id)s
 ORDER BY w.start_time
RETURNING id
"""  # noqa: S608


def backfill(connection: psycopg.Connection, schedule_id: int, from_time: datetime,
             to_time: datetime, which: str = "missing") -> list[int]:
    """Create a job for each of the `windows` that is to have one; return the ids, oldest first.

    Raise `JobRequestError` as `windows` does, and if the schedule's parameters do not fit its
    type; nothing is created then.
    """
    with connection.transaction():
        schedule = query(connection, LOCK_SCHEDULE_SQL, {"id": schedule_id})
        wanted = [window for window in windows(connection, schedule_id, from_time, to_time, which)
                  if window.create]
        [(type_name, parameters)] = schedule
        check_request(connection, type_name, [
            parameters | {"start": _text(w.start), "end": _text(w.end)} for w in wanted[:1]])
        return [job_id for (job_id,) in query(connection, BACKFILL_SQL, {
            "id": schedule_id, "starts": [window.start for window in wanted],
            "ends": [window.end for window in wanted]})]
