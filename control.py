"""Ask for jobs, cancel them, try them again, forget them: what front ends and jobctl call."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import psycopg
from psycopg.types.json import Jsonb

from jobs import JOB_TYPES, parameter_problems
from life import CANCEL_IN_HAND_SQL, CANCEL_WAITING_SQL, RETRY_SQL, STATE_SQL
from parameters import (
    JobRequestError,
    check_schema,
    explain_parameters,
    period_problems,
    schema_problems,
)
from perfdb import GONE_BY, clean, query, rows_of

TYPE_SQL = "SELECT id, parameters_schema FROM job_types WHERE name = %s"
TYPE_NAMES_SQL = "SELECT name FROM job_types ORDER BY name"

CHANGED_TYPES_SQL = """
SELECT known.name
  FROM jsonb_to_recordset(%(types)s::jsonb)
       AS known(name text, description text, parameters_schema jsonb)
 WHERE NOT EXISTS (
         SELECT FROM job_types t
          WHERE t.name = known.name
            AND t.description = known.description
            AND t.parameters_schema = known.parameters_schema)
"""

# A schema is written by whoever knows the type; the limits are the operator's and are left alone.
# No ON CONFLICT alone: it would use up an id at every start of every handler.
WRITE_TYPES_SQL = """
WITH known AS (
    SELECT name, description, parameters_schema
      FROM jsonb_to_recordset(%(types)s::jsonb)
           AS t(name text, description text, parameters_schema jsonb)
), changed AS (
    UPDATE job_types t
       SET description = known.description, parameters_schema = known.parameters_schema
      FROM known
     WHERE t.name = known.name
       AND (t.description, t.parameters_schema)
           IS DISTINCT FROM (known.description, known.parameters_schema)
)
INSERT INTO job_types (name, description, parameters_schema)
SELECT name, description, parameters_schema
  FROM known
 WHERE NOT EXISTS (SELECT FROM job_types t WHERE t.name = known.name)
 ORDER BY name
ON CONFLICT (name) DO NOTHING
"""

# One statement for one job or for ten thousand: the workers are woken once.
CREATE_SQL = """
INSERT INTO job_instances (job_type_id, description, parameters, priority, run_after, unique_key)
SELECT %(type_id)s, %(description)s, p.parameters, %(priority)s,
       COALESCE(%(run_after)s, now()), %(unique_key)s
  FROM jsonb_array_elements(%(parameters)s::jsonb) WITH ORDINALITY AS p(parameters, n)
 ORDER BY n
ON CONFLICT (unique_key) WHERE unique_key IS NOT NULL AND state IN ('Created', 'Queued', 'Running')
                              AND cancel_requested IS NULL
   DO NOTHING
RETURNING id
"""

TRIES = 10  # of a job whose key is held by one that is gone when we look

SAME_KEY_SQL = """
SELECT id
  FROM job_instances
 WHERE unique_key = %(unique_key)s
   AND state IN ('Created', 'Queued', 'Running')
   AND cancel_requested IS NULL
"""


# Jobs of which all of these are true; NULL: no such condition. What a failed step says counts too.
FILTER_SQL = """(%(states)s::text[] IS NULL OR j.state = ANY(%(states)s))
       AND (%(type)s::text IS NULL
            OR j.job_type_id = (SELECT id FROM job_types WHERE name = %(type)s))
       AND (%(since)s::timestamptz IS NULL OR j.created >= %(since)s)
       AND (%(within)s::interval IS NULL OR j.created >= now() - %(within)s::interval)
       AND (%(text)s::text IS NULL
            OR strpos(lower(j.description), lower(%(text)s)) > 0
            OR strpos(lower(j.comment), lower(%(text)s)) > 0
            OR (j.state = 'Failed' AND EXISTS (
                  SELECT FROM job_steps s
                   WHERE s.job_instance_id = j.id
                     AND s.state = 'Failed'
                     AND strpos(lower(s.comment), lower(%(text)s)) > 0)))
"""

MATCHING_SQL = """
SELECT j.id, t.name AS job_type, j.state, j.description
  FROM job_instances j
  JOIN job_types t ON t.id = j.job_type_id
 WHERE (%(ids)s::bigint[] IS NULL OR j.id = ANY(%(ids)s))
   AND """ + FILTER_SQL + """
 ORDER BY j.id
"""


def matching_jobs(connection: psycopg.Connection, ids: Sequence[int] | None = None,
                  **filters: Any) -> list[dict[str, Any]]:
    """Return id, job_type, state and description of the jobs among `ids` that fit `filters`.

    No job has an id beyond bigint.

    `filters`: states (list), type (name), since (moment), within (interval), text (part of the
    description, the comment or a failed step's comment), each None or missing: any.
    """
    params = dict.fromkeys(("states", "type", "since", "within", "text")) | filters
    return rows_of(connection, MATCHING_SQL, params | {
        "ids": None if ids is None else [n for n in ids if -2**63 <= n < 2**63]})


def write_types(connection: psycopg.Connection, names: Sequence[str] | None = None) -> None:
    """Write the job types this process knows (or those `names`), with their schemas, to job_types.

    Nothing is written, and no schema checked, where the table has it all. Raise `ValueError` if a
    schema that is to be written is none.
    """
    types = [{"name": name,
              "description": (JOB_TYPES[name].__doc__ or "").strip().partition("\n")[0],
              "parameters_schema": dict(JOB_TYPES[name]._parameters_schema)}
             for name in (JOB_TYPES if names is None else names)]
    changed = {name for (name,) in query(connection, CHANGED_TYPES_SQL, {"types": Jsonb(types)})}
    for name in changed:
        check_schema(JOB_TYPES[name]._parameters_schema, name)
    if changed:
        connection.execute(WRITE_TYPES_SQL, {
            "types": Jsonb([one for one in types if one["name"] in changed])})


def create_job(connection: psycopg.Connection, type_name: str, parameters: dict[str, Any],
               description: str = "", *, priority: int = 0, run_after: datetime | None = None,
               unique_key: str | None = None) -> int:
    """Ask for a job and return its id.

    With `unique_key` and an unfinished job of that key, nothing is created and that job's id is
    returned. Raise `JobRequestError` if the type is unknown, the parameters do not fit it, or the
    site keeps the row out.
    """
    for _ in range(TRIES):
        ids = create_jobs(connection, type_name, [parameters], description,
                          priority=priority, run_after=run_after, unique_key=unique_key)
        if ids:
            return ids[0]
        if rows := query(connection, SAME_KEY_SQL, {"unique_key": unique_key}):
            return rows[0][0]  # else that job has just ended: ask again
    raise JobRequestError("the database took no job" + GONE_BY.format(table="job_instances"))


def create_jobs(connection: psycopg.Connection, type_name: str,
                parameters: Sequence[dict[str, Any]], description: str = "", *,
                priority: int = 0, run_after: datetime | None = None,
                unique_key: str | None = None) -> list[int]:
    """Ask for one job per element of `parameters`, all or none; return the new ids in that order.

    Raise `JobRequestError` if the type is unknown or any parameters do not fit it.
    """
    type_id = check_request(connection, type_name, parameters)
    return [job_id for (job_id,) in query(connection, CREATE_SQL, {
        "type_id": type_id, "description": description, "parameters": Jsonb(list(parameters)),
        "priority": priority, "run_after": run_after, "unique_key": unique_key})]


def check_request(connection: psycopg.Connection, type_name: str,
                  parameters: Sequence[dict[str, Any]]) -> int:
    """Return the id of the job type.

    Raise `JobRequestError` if it is unknown or any `parameters` do not fit it.
    """
    if not (rows := query(connection, TYPE_SQL, [type_name])):
        raise JobRequestError(unknown_type(connection, type_name))
    type_id, schema = rows[0]
    if type_name in JOB_TYPES:
        schema = JOB_TYPES[type_name]._parameters_schema
    problems = []
    for number, one in enumerate(parameters):
        found = (parameter_problems(JOB_TYPES[type_name], one) if type_name in JOB_TYPES
                 else schema_problems(one, schema) or period_problems(one))
        problems += (found if len(parameters) == 1 else
                     [f"job {number}: {problem}" for problem in found])
    if problems:
        raise JobRequestError(explain_parameters(problems, schema))
    return type_id


def unknown_type(connection: psycopg.Connection, type_name: str) -> str:
    """Return the text that says which job types there are instead of `type_name`."""
    names = ", ".join(repr(name) for (name,) in query(connection, TYPE_NAMES_SQL)) or "none"
    return (f"there is no job type {type_name!r}; known: {names} "
            "(a new one: jobctl.py init --module NAME)")


def cancel_job(connection: psycopg.Connection, job_id: int, reason: str = "") -> str:
    """Cancel an unfinished job; return its state: Failed at once, or the one until its next step.

    Whatever happens to it then, it ends Failed with this reason. Raise `ValueError` if there is no
    such job or it has ended.
    """
    params = {"job_id": job_id,
              "comment": clean(f"Cancelled: {reason or 'no reason given'}", connection)}
    while True:
        for sql in (CANCEL_WAITING_SQL, CANCEL_IN_HAND_SQL):
            if rows := query(connection, sql, params):
                return rows[0][0]
        state = _state(connection, job_id)
        if state in ("Finished", "Failed"):
            raise ValueError(f"job {job_id} cannot be cancelled: it is {state}; "
                             "only an unfinished job can be")
        # It was claimed or put back between the two: ask again.


def retry_job(connection: psycopg.Connection, job_id: int, every_step: bool = False) -> str:
    """Have the Failed steps of a job run again (or `every_step`) and return its new state.

    It has all its attempts again. Raise `ValueError` if there is no such job, it has not ended, or
    another unfinished job has its unique_key or its window of a schedule.
    """
    try:
        if rows := query(connection, RETRY_SQL, {"job_id": job_id, "all": every_step}):
            return rows[0][0]
    except psycopg.errors.UniqueViolation:
        raise ValueError(f"job {job_id} cannot be retried now: another unfinished job has its "
                         "unique_key or window; cancel that one or wait for it") from None
    raise ValueError(f"job {job_id} cannot be retried: it is {_state(connection, job_id)}; "
                     "only a Failed job can be, or with --all a Finished one")


def _state(connection: psycopg.Connection, job_id: int) -> str:
    if rows := query(connection, STATE_SQL, {"job_id": job_id}):
        return rows[0][0]
    raise ValueError(f"there is no job {job_id} in job_instances")


BATCH = 200  # jobs deleted per commit

# Oldest first, past what the last batch has seen; a job somebody has locked is left for later.
PRUNE_SQL = """
WITH doomed AS (
    SELECT id
      FROM job_instances
     WHERE id > %(after)s
       AND state IN ('Finished', 'Failed')
       AND finished < now() - %(age)s::interval
     ORDER BY id
     LIMIT %(batch)s
       FOR UPDATE SKIP LOCKED
), gone AS (
    DELETE FROM job_instances j USING doomed WHERE j.id = doomed.id
)
SELECT id FROM doomed
"""

COUNT_OLD_SQL = """
SELECT count(*)
  FROM job_instances
 WHERE state IN ('Finished', 'Failed')
   AND finished < now() - %(age)s::interval
"""


def count_ended(connection: psycopg.Connection, age: str) -> int:
    """Return how many jobs ended longer ago than `age`, an interval as PostgreSQL reads it."""
    return query(connection, COUNT_OLD_SQL, {"age": age})[0][0]


def delete_ended(connection: psycopg.Connection, age: str) -> int:
    """Delete the jobs that ended longer ago than `age`, and their steps; return how many."""
    after, count = 0, 0
    while ids := query(connection, PRUNE_SQL, {"after": after, "age": age, "batch": BATCH}):
        after, count = max(ids)[0], count + len(ids)
    return count
