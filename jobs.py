"""What a job type's author writes and reads: JobInstance, and the registry of job types.

A job file subclasses `JobInstance`, names itself (`_name`), says which parameters it takes
(`_parameters_schema`), splits a job into steps (`_create_steps`) and runs one (`_run_step`).
Everything else, states, comments, time limits, who owns a job, is done here. A job file needs no
other import: what it uses is handed on by this module.
"""

from __future__ import annotations

import contextlib
import json
import logging
import signal
import threading
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, ClassVar

import psycopg
from psycopg.types.json import Jsonb as Jsonb

from life import (
    BEGIN_SQL,
    CANCELLED_SQL,
    END_AND_CLAIM_SQL,
    END_SQL,
    MANY_STEPS,
    NEXT_SQL,
    QUEUE_SQL,
    READ_SQL,
    REFUSE_SQL,
    STEPS_SQL,
    JobTakenOver,
    as_job,
)
from parameters import (
    JobRequestError,
    explain_parameters,
    period_problems,
    schema_problems,
)
from perfdb import TIME as TIME
from perfdb import clean, query
from perfdb import connect as connect
from perfdb import parse_time as parse_time
from worker import Worker, current_worker
from worker import use_worker as use_worker

log = logging.getLogger(__name__)

#: job type name -> class; filled by importing job files
JOB_TYPES: dict[str, type[JobInstance]] = {}


class JobStepError(Exception):
    """The step cannot succeed; the text becomes its comment."""


class StepTimeout(KeyboardInterrupt):
    """The step has run for as long as it may.

    A KeyboardInterrupt, because psycopg cancels the running query on that one, and because
    `except Exception` in a step must not swallow it.
    """


#: what a step is told of itself, in the order of STEPS_SQL; the values of a step that says nothing
STEP = {"id": 0, "name": "", "object_id": None, "alarm_id": None, "feature_id": None, "parameters": {}, "attempts": 0}


class JobInstance:
    """One job, taken up by this process's worker.

    Subclasses set `_name` and write `_create_steps` and `_run_step`; see README.md for a whole one.
    """

    _name: ClassVar[str]
    #: JSON Schema (2020-12) of the job's parameters
    _parameters_schema: ClassVar[Mapping[str, Any]] = {"type": "object"}
    #: true if steps touch this database only: a step's writes and its Finished mark then commit together
    _step_in_transaction: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if (name := cls.__dict__.get("_name")) is None:
            return
        if name in JOB_TYPES:
            raise ValueError(f"job type {name!r} is defined twice: by {cls.__module__}.{cls.__qualname__} and by "
                             f"{JOB_TYPES[name].__module__}.{JOB_TYPES[name].__qualname__}; rename one")
        JOB_TYPES[name] = cls

    def __init__(self, job_id: int, skip_test: bool = True, delay_steps_creation: bool = False) -> None:
        """Take up job `job_id`: check its parameters, create its steps, state Queued.

        With `skip_test` a job with "test" in its description is left as it is and `run` returns [].
        With `delay_steps_creation` the subclass calls `_create_database_steps` itself.
        A Queued job that this worker owns is resumed: its steps are loaded.

        Raise `TypeError` if `job_id` is no int, `ValueError` if the class has no `_name`, there is no
        such job, its type is another, or its state is not Created. Raise `JobRequestError` if its
        parameters are wrong or cannot be turned into steps; the job is then Failed with that text.
        """
        if not isinstance(job_id, int) or isinstance(job_id, bool):
            raise TypeError(f"job_id must be an int, not {job_id!r}")
        if not getattr(self, "_name", None):
            raise ValueError(f"{type(self).__name__} has no _name: set it to the job type's name")
        self._worker = current_worker()
        self._job_id = job_id
        self._job_step_ids: list[int] | None = None
        self._failed: list[int] = []  # ids of the steps that failed in this attempt
        self._todo: Iterator[dict[str, Any]] = iter(())  # the steps still to run, in order
        self._step: dict[str, Any] = {}
        self._job = self._read()
        self._skipped = skip_test and "test" in self.description.lower()
        if self._skipped:
            return
        self._check_row()
        self._application_name = f"job {job_id} {self._name}"
        if self._job["state"] == "Queued":
            self._load_steps()
            return
        with self._refusing():
            self._check()
        if not delay_steps_creation:
            self._create_database_steps()

    # What a subclass writes.

    def _create_steps(self) -> list[dict[str, Any]]:
        """Return the steps in the order they are to run, [] if there is nothing to do.

        Each is a dict of columns of job_steps: name, object_id, alarm_id, feature_id, parameters; all
        may be left out. Raise `JobRequestError` if the request cannot be turned into steps.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how to create its steps")

    def _run_step(self, step_id: int) -> Mapping[str, Any] | None:
        """Run one step, `self.step`; what is returned becomes its `result` (a JSON object or None).

        Raise `JobStepError` if it cannot be done; the other steps run all the same.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how to run a step")

    @classmethod
    def _check_parameters(cls, parameters: dict[str, Any]) -> list[str]:
        """Return problems that a JSON Schema cannot say, each as '$.path: what'."""
        return []

    # What a subclass and its callers read.

    @property
    def job_id(self) -> int:
        return self._job_id

    @property
    def name(self) -> str:
        """The job type's name."""
        return self._name

    @property
    def description(self) -> str:
        return self._job["description"]

    @property
    def parameters(self) -> dict[str, Any]:
        return self._job["parameters"]

    @property
    def job_step_ids(self) -> list[int] | None:
        """The ids of all steps in order; None until they are created."""
        return self._job_step_ids

    @property
    def connection(self) -> psycopg.Connection:
        """The worker's connection, in autocommit mode; a step uses this one."""
        return self._worker.connection

    @property
    def step(self) -> dict[str, Any]:
        """The running step: id, name, object_id, alarm_id, feature_id, parameters, attempts.

        As it was created, or found when the job was resumed; not read again before it runs.
        """
        return self._step

    @property
    def state(self) -> str:
        """The job's state, as far as this worker knows it."""
        return self._job["state"]

    # Taking it up.

    def _read(self) -> dict[str, Any]:
        row, self._worker.claimed = self._worker.claimed, None
        if row is None or row["id"] != self._job_id:
            found = self._worker.execute(READ_SQL, {"job_id": self._job_id}).fetchone()
            if found is None:
                raise ValueError(f"there is no job {self._job_id} in job_instances")
            row = as_job(found)
        return row

    def _check_row(self) -> None:
        if self._job["job_type"] != self._name:
            raise ValueError(f"job {self._job_id} is of type {self._job['job_type']!r}, "
                             f"but {type(self).__name__} runs {self._name!r}")
        mine = self._job["worker_id"] == self._worker.id
        if not (self._job["state"] == "Created" or (self._job["state"] == "Queued" and mine)):
            raise ValueError(f"job {self._job_id} is in state {self._job['state']!r}, not 'Created'")

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """Fail the job, with the explanation in its comment, if it cannot be turned into steps."""
        try:
            yield
        except JobTakenOver:
            raise
        except Exception as exc:
            if not self.connection.closed:
                refuse(self._worker, self._job_id, exc)
            raise

    def _check(self) -> None:
        if problems := parameter_problems(type(self), self.parameters):
            raise JobRequestError(explain_parameters(problems, self._parameters_schema)
                                  + "; insert a corrected job")

    def _create_database_steps(self) -> None:
        """Create the rows of `_create_steps` and set the job Queued, in one transaction."""
        with self._refusing():
            steps = json.dumps(self._create_steps())
            row = self._worker.execute(QUEUE_SQL, self._ids() | {
                "steps": steps, "begin": self._worker.begin_at_once,
                "application_name": self._application_name}).fetchone()
        if row is None:
            raise JobTakenOver(f"job {self._job_id} was taken by another worker")
        self._job["state"], step_ids, *_ = row
        self._job_step_ids = sorted(step_ids)
        # From JSON, so that a step is told the same whether the job is new or resumed.
        self._todo = (as_created(step_id, position, step) for position, (step_id, step) in
                      enumerate(zip(self._job_step_ids, json.loads(steps), strict=True), 1))

    def _load_steps(self) -> None:
        rows = query(self.connection, STEPS_SQL, {"job_id": self._job_id})
        self._job_step_ids = [step_id for step_id, *_ in rows]
        self._failed = [step_id for step_id, *_, state in rows if state == "Failed"]
        self._todo = (dict(zip(STEP, step, strict=True))
                      for *step, state in rows if state not in ("Finished", "Failed"))

    # Running it.

    def run(self) -> list[int]:
        """Run the steps that are left and return the ids of those that failed in this attempt.

        Raise `ValueError` if the steps are not created or the state is not Queued, `JobTakenOver` if
        the job belongs to another worker by now, `psycopg.OperationalError` if the connection is lost.
        """
        if self._skipped:
            return []
        if self._job_step_ids is None:
            raise ValueError(f"the steps of job {self._job_id} are not created: "
                             "call _create_database_steps first")
        if len(self._job_step_ids) >= MANY_STEPS:
            self._worker.forget_plans()
        todo, self._todo = self._todo, iter(())
        step = next(todo, None)
        cancelled = self.state != "Running" and self._begin(step)
        while step and not cancelled:
            self._step = step | {"attempts": step["attempts"] + 1}
            following = next(todo, None)
            cancelled = self._work(step["id"], following and following["id"])
            if self.state != "Running":
                return self._failed
            step = following
        self._end(cancelled)
        return self._failed

    def _begin(self, step: dict[str, Any] | None) -> bool:
        """Let the job and its first step be Running; return true if it was cancelled instead."""
        row = self._worker.execute(BEGIN_SQL, self._ids() | {
            "next_id": step and step["id"], "application_name": self._application_name}).fetchone()
        if row is None:
            state = self._read()["state"]
            if state == "Queued":
                raise JobTakenOver(f"job {self._job_id} belongs to another worker")
            raise ValueError(f"job {self._job_id} is in state {state!r}, not 'Queued'")
        self._job["state"] = "Running"
        return row[0]

    def _ids(self) -> dict[str, Any]:
        return {"job_id": self._job_id, "worker_id": self._worker.id}

    def _work(self, step_id: int, next_id: int | None) -> bool:
        """Run a step and record its end, and with it the next one's begin or the job's end.

        Return true if the job was cancelled and the next step therefore not begun.
        """
        in_transaction = (self.connection.transaction() if self._step_in_transaction
                          else contextlib.nullcontext())
        try:
            with in_transaction:
                result = self._run_limited(step_id)
                recorded = self._record({"step_id": step_id, "step_state": "Finished", "step_comment": None,
                                         "step_result": None if result is None else json.dumps(result)}, next_id)
            return self._believe(*recorded)
        except JobTakenOver:
            raise
        except (Exception, SystemExit, StepTimeout) as exc:
            if self.connection.closed:
                raise  # not the step's fault; whoever resumes the job runs it again
            if self.connection.info.transaction_status:  # not idle: left open by the step
                self.connection.rollback()
            comment = self._explain(step_id, exc)
        self._failed.append(step_id)
        mark = {"step_id": step_id, "step_state": "Failed", "step_comment": comment, "step_result": None}
        return self._believe(*self._record(mark, next_id))

    def _run_limited(self, step_id: int) -> Mapping[str, Any] | None:
        with time_limit(self._job["step_timeout"]):
            result = self._run_step(step_id)
        if self.connection.info.transaction_status and not self._step_in_transaction:
            raise JobStepError("The step left a transaction open; it was rolled back. "
                               "Use `with self.connection.transaction():`")
        log.debug("job=%d step=%d state=Finished name=%r", self._job_id, step_id, self._step["name"])
        return result

    def _explain(self, step_id: int, exc: BaseException) -> str:
        """Return the comment of a step that failed with `exc`, and write the log."""
        known = isinstance(exc, JobStepError | StepTimeout)
        log.error("job=%d step=%d state=Failed name=%r: %s", self._job_id, step_id, self._step["name"],
                  exc or type(exc).__name__, exc_info=None if known else exc)
        return clean(str(exc) if known else
                     f"Unknown error, please check the logs: {exc or type(exc).__name__}")

    def _record(self, mark: dict[str, Any], next_id: int | None) -> tuple[str, dict[str, Any] | None, bool]:
        """Write a step's end and what follows; return the job's state, the job claimed, whether it was cancelled."""
        if next_id is None:
            return self._write_end(mark, **self._outcome())
        if self._worker.stopping():
            return self._write_end(mark, state="Queued", counted=0)
        written = self._worker.execute(NEXT_SQL, self._ids() | mark | {"next_id": next_id}).rowcount
        if not written:
            raise JobTakenOver(f"job {self._job_id} was taken over; step {mark['step_id']} is not recorded")
        return "Running", None, written == 1

    def _believe(self, state: str, claimed: dict[str, Any] | None, cancelled: bool) -> bool:
        """Take note of what `_record` wrote, now that it is committed."""
        self._job["state"] = state
        if state != "Running":
            self._worker.claimed = claimed
        return cancelled

    def _end(self, cancelled: bool) -> None:
        """End a job of which no step is running."""
        outcome = self._outcome()
        if cancelled:
            (comment,) = self._worker.execute(CANCELLED_SQL, self._ids()).fetchone()
            outcome = {"state": "Failed", "comment": comment}
        mark = {"step_id": None, "step_state": None, "step_comment": None, "step_result": None}
        self._believe(*self._write_end(mark, **outcome))

    def _outcome(self) -> dict[str, Any]:
        """Return how the job ends when all steps have run."""
        failed, total = len(self._failed), len(self._job_step_ids)
        if not total:
            return {"state": "Finished", "comment": "No steps: there was nothing to do"}
        if not failed:
            return {"state": "Finished"}
        comment = f"{failed} ({100 * failed / total:.2f}%) steps failed"
        attempt, of = self._job["attempts"] + 1, self._job["max_attempts"]
        if attempt < of:
            return {"state": "Queued", "again": True,
                    "comment": f"{comment}, attempt {attempt} of {of}; they run again after run_after"}
        return {"state": "Failed", "comment": comment}

    def _write_end(self, mark: dict[str, Any], state: str, comment: str | None = None, again: bool = False,
                   counted: int = 1) -> tuple[str, dict[str, Any] | None, bool]:
        """End the job (state Queued: hand it back), and claim the next if the worker is to go on."""
        if again and mark["step_state"] == "Failed":
            mark = mark | {"step_state": "Created"}
        claim = self._worker.claim_at_end
        if state == "Queued" or self._worker.stopping():
            claim = None
        rows = self._worker.execute(END_AND_CLAIM_SQL if claim else END_SQL, self._ids() | mark | (claim or {}) | {
            "state": state, "comment": comment, "again": again, "counted": counted,
            "application_name": self._worker.idle_name}).fetchall()
        claimed = next((as_job(row) for row in rows if row[0] != self._job_id), None)
        if all(row[0] != self._job_id for row in rows):
            if not self.connection.info.transaction_status:  # else the claim is rolled back
                self._worker.claimed = claimed
            raise JobTakenOver(f"job {self._job_id} was taken over; its end is not recorded")
        return state, claimed, False


def as_created(step_id: int, position: int, given: dict[str, Any]) -> dict[str, Any]:
    """Return a step that `_create_steps` gave as QUEUE_SQL has written it."""
    step = STEP | {"id": step_id, "name": f"step {position}"}
    return step | {column: value for column, value in given.items() if column in STEP and value is not None}


def refuse(worker: Worker, job_id: int, exc: Exception) -> None:
    """Fail a job that cannot be turned into steps, with the explanation as its comment; once."""
    known = isinstance(exc, JobRequestError)
    comment = str(exc) if known else f"Unknown error, please check the logs: {exc or type(exc).__name__}"
    if worker.connection.info.transaction_status:
        worker.connection.rollback()
    if worker.execute(REFUSE_SQL, {"job_id": job_id, "worker_id": worker.id, "comment": clean(comment)}).fetchone():
        log.error("job=%d state=Failed: %s", job_id, exc or type(exc).__name__, exc_info=None if known else exc)


@contextlib.contextmanager
def time_limit(limit: timedelta) -> Iterator[None]:
    """Raise `StepTimeout` in the block once `limit` is over, in a query, a socket or plain Python.

    Signals reach the main thread only: in another one there is no limit, and what hangs there is
    ended by a neighbour (`end_overrun`).
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    _limit[:] = [limit]
    if signal.getsignal(signal.SIGALRM) is not _stop:
        signal.signal(signal.SIGALRM, _stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, limit.total_seconds())
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


_limit: list[timedelta] = []  # of the running step


def _stop(*_: Any) -> None:
    raise StepTimeout(f"Timed out: longer than the step limit of {_limit[0]} (job_types.step_timeout)")


def parameter_problems(job_type: type[JobInstance], parameters: Any) -> list[str]:
    """Return all that is wrong with `parameters`, each as '$.path: what'; [] if they fit."""
    problems = []
    if job_type._parameters_schema is not JobInstance._parameters_schema:
        problems = schema_problems(parameters, job_type._parameters_schema)
    if isinstance(parameters, dict):
        problems += period_problems(parameters)
        if not problems:  # what follows may rely on the schema
            problems = job_type._check_parameters(parameters)
    return problems
