"""Which job to take in hand, and taking it: the claim."""

from __future__ import annotations

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


# The most urgent job that is due, of a type we know and that may have one more running.
# SKIP LOCKED: two workers asking at once get two different rows, neither waits; who then updates
# the row needs no second look, because it is locked and was checked again when the lock was granted.
# The types come first, as an array, so that the jobs are read in the order of job_instances_free_idx
# and reading stops at the first that fits: a join would sort them all.
CANDIDATE_CTE = """
candidate AS (
    SELECT id
      FROM job_instances
     WHERE state IN ('Created', 'Queued')
       AND worker_id IS NULL
       AND run_after <= now()
       AND job_type_id = ANY(ARRAY(
               SELECT id
                 FROM job_types
                WHERE %(types)s::jsonb ? name
                  AND (max_running IS NULL OR job_type_has_room(id, max_running))))
       AND (%(with_tests)s OR description NOT ILIKE '%%test%%')
     ORDER BY priority DESC, id
     LIMIT 1
       FOR UPDATE SKIP LOCKED
)"""

# Not waiting for the disk: a claim that a crash of the server forgets leaves the job free, as it was.
# last_state_change: from here on the job is being taken up, and that has its limit too.
CLAIM_SQL = f"""
WITH {CANDIDATE_CTE}
UPDATE job_instances j
   SET worker_id = %(worker_id)s,
       last_state_change = clock_timestamp()
  FROM candidate, job_types t
 WHERE j.id = candidate.id
   AND t.id = j.job_type_id
RETURNING {JOB_COLUMNS}, set_config('synchronous_commit', 'off', true)
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
