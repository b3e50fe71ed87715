"""Which job to take in hand, and taking it: the claim."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worker import Worker


@dataclass(frozen=True, slots=True)
class Job:
    """A row of job_instances as its worker knows it, with what its type says of it.

    `parameters` is JSON text: who takes the job up parses it, under guard.
    """

    id: int
    state: str
    description: str
    parameters: str
    attempts: int
    worker_id: int | None
    type_name: str
    max_attempts: int
    step_timeout: timedelta


#: the columns of `Job`, of a job j and its type t
JOB_COLUMNS = """j.id, j.state, j.description, j.parameters::text, j.attempts, j.worker_id,
       t.name, t.max_attempts, t.step_timeout"""

READ_SQL = f"""
SELECT {JOB_COLUMNS}
  FROM job_instances j
  JOIN job_types t ON t.id = j.job_type_id
 WHERE j.id = %(job_id)s
"""  # noqa: S608


def read(worker: Worker, job_id: int) -> Job | None:
    """Return the job, None if there is none."""
    row = worker.execute(READ_SQL, {"job_id": job_id}).fetchone()
    return row and Job(*row)


# The most urgent job that is due, of a type we know and that may have one more running: the
# highest priority first, then what has been due longest. A plain ORDER BY ... LIMIT 1 over all
# free jobs reads those that may not be taken as well, and behind 100,000 of them a claim takes 20
# ms instead of 0.1. So `level` jumps over job_instances_waiting_idx: of each type, its jobs with
# "test" apart, and priority it reads only the first job, and of a type we do not want only the
# first of all. If the first of a level is not due yet, none of the level is. Then the levels are
# tried from the top, and the first job in them that nobody has locked is ours. LATERAL keeps the
# order and stops at the first: it asks for room in no type that comes later. SKIP LOCKED: two
# workers asking at once get two different rows, neither waits; who then updates the row needs no
# second look, because it is locked and was checked again when the lock was granted. One level at a
# time and not all types at once: with few rows expected the plan for any parameters stays as cheap
# as the planner's for these, and the statement is not planned anew at each claim.
CANDIDATE_CTE = """
candidate AS (
    WITH RECURSIVE level AS (
        SELECT -2147483648 AS job_type_id, false AS is_test, -32769 AS priority,  -- before all
               timestamptz 'infinity' AS run_after, NULL::bigint AS id,
               true AS is_wanted, NULL::int AS max_running
         UNION ALL
        SELECT first.*, t.id IS NOT NULL AND first.is_test <= %(with_tests)s, t.max_running
          FROM level l
         CROSS JOIN LATERAL (
               SELECT j.job_type_id, j.description ILIKE '%%test%%' AS is_test, j.priority::int,
                      j.run_after, j.id
                 FROM job_instances j
                WHERE j.state IN ('Created', 'Queued')
                  AND j.worker_id IS NULL
                  AND (j.job_type_id, j.description ILIKE '%%test%%', j.priority)
                      > (l.job_type_id, l.is_test OR NOT l.is_wanted,
                         CASE WHEN l.is_wanted THEN l.priority ELSE 32767 END)
                ORDER BY j.job_type_id, j.description ILIKE '%%test%%', j.priority,
                         j.run_after, j.id
                LIMIT 1) AS first
          LEFT JOIN job_types t ON t.id = first.job_type_id
                               AND %(types)s::jsonb ? t.name
                               AND t.max_running IS DISTINCT FROM 0
    )
    SELECT j.id
      FROM (SELECT *
              FROM level
             WHERE is_wanted
               AND run_after <= now()
             ORDER BY priority DESC, run_after, id) AS l
     CROSS JOIN LATERAL (
           SELECT l.max_running IS NULL OR job_type_has_room(l.job_type_id, l.max_running)
           ) AS type (has_room)  -- apart: asked once per level, not once per job
     CROSS JOIN LATERAL (
           SELECT j.id
             FROM job_instances j
            WHERE type.has_room
              AND j.state IN ('Created', 'Queued')
              AND j.worker_id IS NULL
              AND j.job_type_id = l.job_type_id
              AND (j.description ILIKE '%%test%%') = l.is_test
              AND j.priority = l.priority
              AND j.run_after <= now()
              AND (j.run_after, j.id) >= (l.run_after, l.id)  -- not once more what level read past
            ORDER BY j.run_after, j.id
            LIMIT 1
              FOR UPDATE SKIP LOCKED) AS j
     LIMIT 1
)"""

# last_state_change: from here on the job is being taken up, and that has its limit too.
CLAIMED_CTE = f"""{CANDIDATE_CTE}, claimed AS (
    UPDATE job_instances j
       SET worker_id = %(worker_id)s,
           last_state_change = clock_timestamp()
      FROM candidate, job_types t
     WHERE j.id = candidate.id
       AND t.id = j.job_type_id
    RETURNING {JOB_COLUMNS}
)"""  # noqa: S608

# Alone it does not wait for the disk: a claim that a crash of the server forgets leaves the job
# free, as it was. With the end of a job (`and_claim`) it does: what was Finished stays so.
CLAIM_SQL = f"""
WITH {CLAIMED_CTE}
SELECT claimed.*, set_config('synchronous_commit', 'off', true) FROM claimed
"""  # noqa: S608


@functools.cache
def and_claim(sql: str) -> str:
    """Return a statement that leaves a job, of which `job` is the row, with the next claim in it.

    Two commits would be one too many, and a second statement in the same one costs a fifth of a
    job of one step. It returns one row: the state and the `Job`, NULL where there is none.
    """
    changes, _ = sql.rsplit("\nSELECT ", 1)
    return f"""{changes}, {CLAIMED_CTE}
SELECT job.state, claimed.*
  FROM (SELECT set_config('application_name', %(application_name)s, false)) AS named
  LEFT JOIN job ON true
  LEFT JOIN claimed ON true
"""  # noqa: S608


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which jobs a worker claims: of these types, and whether "test" in a description matters."""

    types: str  # JSON array of names
    with_tests: bool = False

    @classmethod
    def of(cls, types: Sequence[str], with_tests: bool = False) -> Wanted:
        return cls(json.dumps(list(types)), with_tests)

    def values(self, worker: Worker) -> dict[str, Any]:
        return {"types": self.types, "with_tests": self.with_tests, "worker_id": worker.id}


def claim(worker: Worker, wanted: Wanted) -> Job | None:
    """Take the most urgent due job and return it, None if there is none."""
    row = worker.execute(CLAIM_SQL, wanted.values(worker), over=True).fetchone()
    return row and Job(*row[:-1])


# One certain job, which somebody takes up without a handler; room is asked for as in a claim.
CLAIM_THIS_SQL = f"""
UPDATE job_instances j
   SET worker_id = %(worker_id)s,
       last_state_change = clock_timestamp()
  FROM job_types t
 WHERE j.id = %(job_id)s
   AND j.state = 'Created'
   AND (j.worker_id = %(worker_id)s
        OR (j.worker_id IS NULL AND (t.max_running IS NULL
                                     OR job_type_has_room(t.id, t.max_running))))
   AND t.id = j.job_type_id
RETURNING {JOB_COLUMNS}
"""  # noqa: S608


def claim_this(worker: Worker, job_id: int) -> Job | None:
    """Take a Created job that nobody else has; None if it may not be taken now."""
    row = worker.execute(CLAIM_THIS_SQL, {"job_id": job_id, "worker_id": worker.id}).fetchone()
    return row and Job(*row)
