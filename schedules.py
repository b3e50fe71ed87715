"""Jobs owed window by window: which windows are due, and adding, listing and changing schedules."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import psycopg
from psycopg.types.json import Jsonb

from control import check_request, unknown_type
from parameters import JobRequestError
from perfdb import query

log = logging.getLogger(__name__)

# One job for every window that is over. A schedule's row is locked while its jobs are made, and a
# second handler passes it by (SKIP LOCKED), so no window comes twice; next_start moves in the same
# statement, so none is lost. Months and days keep their calendar length in the zone of the session.
# Bounded, so that a schedule left off for years does not fill the table in one transaction.
DUE_SQL = """
WITH RECURSIVE schedule AS MATERIALIZED (
    SELECT *
      FROM job_schedules
     WHERE enabled
       AND next_start + every + delay <= COALESCE(%(now)s, now())
     ORDER BY id
       FOR UPDATE SKIP LOCKED
), period AS (
    SELECT id, next_start AS from_time, next_start + every AS to_time, 1 AS n
      FROM schedule
     UNION ALL
    SELECT s.id, p.to_time, p.to_time + s.every, p.n + 1
      FROM period p
      JOIN schedule s ON s.id = p.id
     WHERE p.to_time + s.every + s.delay <= COALESCE(%(now)s, now())
       AND p.n < %(most)s
), moved AS (
    UPDATE job_schedules s
       SET next_start = latest.to_time
      FROM (SELECT id, max(to_time) AS to_time FROM period GROUP BY id) AS latest
     WHERE s.id = latest.id
)
INSERT INTO job_instances (job_type_id, description, parameters, schedule_id)
SELECT s.job_type_id, s.description,
       s.parameters || pg_catalog.jsonb_build_object('start', to_char(p.from_time, 'YYYY-MM-DD HH24:MI:SSTZH:TZM'),
                                          'end',   to_char(p.to_time,   'YYYY-MM-DD HH24:MI:SSTZH:TZM')),
       s.id
  FROM period p
  JOIN schedule s ON s.id = p.id
 ORDER BY p.from_time, s.id
RETURNING id
"""

ANY_DUE = """EXISTS (
    SELECT FROM job_schedules
     WHERE enabled
       AND next_start + every + delay <= now())"""

MOST_WINDOWS = 1000  # per schedule and statement; the next look, a second later, makes the next


def create_due_jobs(connection: psycopg.Connection, now: datetime | None = None) -> list[int]:
    """Create the jobs that schedules owe at `now` (the server's clock), oldest first; return their ids."""
    ids = [job_id for (job_id,) in query(connection, DUE_SQL, {"now": now, "most": MOST_WINDOWS})]
    for job_id in ids:
        log.info("job=%d created by its schedule", job_id)
    return ids

ADD_SCHEDULE_SQL = """
INSERT INTO job_schedules (job_type_id, description, parameters, every, next_start, delay)
SELECT id, %(description)s, %(parameters)s, %(every)s::interval, %(start)s, %(delay)s::interval
  FROM job_types
 WHERE name = %(type)s
RETURNING id, to_char(next_start, 'YYYY-MM-DD HH24:MI:SSTZH:TZM'),
          to_char(next_start + every, 'YYYY-MM-DD HH24:MI:SSTZH:TZM')
"""


def add_schedule(connection: psycopg.Connection, type_name: str, parameters: Mapping[str, Any], *,
                 every: str, start: datetime, delay: str = "0s", description: str = "") -> int:
    """Owe a job for every window of time from `start` on, and return the schedule's id.

    `every` and `delay` are intervals as PostgreSQL reads them. Raise `JobRequestError` if the type is
    unknown or the parameters, with a window's start and end, do not fit it; nothing is added then.
    """
    with connection.transaction():
        rows = query(connection, ADD_SCHEDULE_SQL, {
            "type": type_name, "description": description, "every": every, "delay": delay,
            "start": start, "parameters": Jsonb(dict(parameters))})
        if not rows:
            raise JobRequestError(unknown_type(connection, type_name))
        schedule_id, first_start, first_end = rows[0]
        check_request(connection, type_name, [{**parameters, "start": first_start, "end": first_end}])
    return schedule_id


SCHEDULES_SQL = """
SELECT s.id, t.name AS job_type, s.description, s.parameters, s.every::text AS every, s.next_start,
       s.delay::text AS delay, s.enabled, j.id AS last_job_id, j.state AS last_job_state
  FROM job_schedules s
  JOIN job_types t ON t.id = s.job_type_id
  LEFT JOIN LATERAL (
        SELECT id, state FROM job_instances WHERE schedule_id = s.id ORDER BY id DESC LIMIT 1) j ON %(last)s
 ORDER BY s.id
"""

CHANGE_SCHEDULE_SQL = {
    "enable": "UPDATE job_schedules SET enabled = true WHERE id = %(id)s RETURNING id",
    "disable": "UPDATE job_schedules SET enabled = false WHERE id = %(id)s RETURNING id",
    "remove": "DELETE FROM job_schedules WHERE id = %(id)s RETURNING id",
}
