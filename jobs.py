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
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, ClassVar

import psycopg
from psycopg.types.json import Jsonb as Jsonb

import claims
import life
from answers import checked_definition, checked_result, checked_steps, said
from life import JobTakenOver as JobTakenOver
from life import StepEnd
from limits import StepTimeout as StepTimeout
from limits import is_interrupt, time_limit
from parameters import (
    JobRequestError,
    explain_parameters,
    parse,
    period_problems,
    refuse_foreign_refs,
    schema_problems,
)
from perfdb import GONE_BY, clean, is_passing, query
from perfdb import TIME as TIME
from perfdb import connect as connect
from perfdb import parse_time as parse_time
from session import MANY_STEPS
from worker import Worker, current_worker
from worker import use_worker as use_worker

log = logging.getLogger(__name__)

#: job type name -> class; filled by importing job files
JOB_TYPES: dict[str, type[JobInstance]] = {}

#: what a step is told of itself, in the order of STEPS_SQL; the values of a step that says nothing
STEP = {"id": 0, "name": "", "object_id": None, "alarm_id": None, "feature_id": None,
        "parameters": {}, "attempts": 0}

STEPS_SQL = """
SELECT id, name, object_id, alarm_id, feature_id, parameters, attempts, state
  FROM job_steps
 WHERE job_instance_id = %(job_id)s
 ORDER BY position
"""

# The job that a handler has claimed for the construction now under way; see `take_up`.
_CLAIMED: ContextVar[claims.Job | None] = ContextVar("claimed job", default=None)


class JobStepError(Exception):
    """The step cannot succeed; the text becomes its comment."""


class _StepFailed(Exception):
    """A step went wrong with `exc`. Raised so that its transaction is rolled back."""

    def __init__(self, exc: BaseException) -> None:
        self.exc = exc


class JobInstance:
    """One job, taken up by this thread's worker.

    Subclasses set `_name` and write `_create_steps` and `_run_step`; README.md has a whole one.
    """

    _name: ClassVar[str]
    #: JSON Schema (2020-12) of the job's parameters
    _parameters_schema: ClassVar[Mapping[str, Any]] = {"type": "object"}
    #: true if steps touch this database only: a step's writes and its Finished commit together
    _step_in_transaction: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if (name := cls.__dict__.get("_name")) is None:
            return
        checked_definition(f"{cls.__module__}.{cls.__qualname__}", name, cls._parameters_schema)
        if name in JOB_TYPES:
            raise ValueError(
                f"job type {name!r} is defined twice: by {cls.__module__}.{cls.__qualname__} and "
                f"by {JOB_TYPES[name].__module__}.{JOB_TYPES[name].__qualname__}; rename one")
        refuse_foreign_refs(cls._parameters_schema, name)
        JOB_TYPES[name] = cls

    def __init__(self, job_id: int, skip_test: bool = True,
                 delay_steps_creation: bool = False) -> None:
        """Take up job `job_id`: check its parameters, create its steps, state Queued.

        With `skip_test` a job with "test" in its description is left as it is and `run` returns
        []. With `delay_steps_creation` the subclass calls `_create_database_steps` itself. A
        Queued job is taken up again only by the handler that has just claimed it: its steps are
        loaded.

        Raise `TypeError` if `job_id` is no int, `ValueError` if the class has no `_name`, there is
        no such job, its type is another, its state is not Created, or somebody else has it. Raise
        `JobRequestError` if its parameters are wrong or cannot be turned into steps; the job is
        then Failed with that text.
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
        self._application_name = f"job {job_id} {self._name}"
        claimed = _CLAIMED.get()
        self._claimed = claimed is not None and claimed.id == job_id
        self._job = claimed if self._claimed else self._found()
        self._outcome = life.Outcome(self._job.state)
        self._skipped = skip_test and "test" in self.description.lower()
        if self._skipped:
            return
        self._take()
        with self._refusing():
            self._parameters = self._checked_parameters()
        if self._job.state == "Queued":
            self._load_steps()
        elif not delay_steps_creation:
            self._create_database_steps()

    # What a subclass writes.

    def _create_steps(self) -> list[dict[str, Any]]:
        """Return the steps in the order they are to run, [] if there is nothing to do.

        Each is a dict of columns of job_steps: name, object_id, alarm_id, feature_id, parameters;
        all may be left out. Raise `JobRequestError` if the request cannot be turned into steps.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how to create its steps")

    def _run_step(self, step_id: int) -> Mapping[str, Any] | None:
        """Run one step, `self.step`; what is returned becomes its `result` (JSON object or None).

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
        return self._job.description

    @property
    def parameters(self) -> dict[str, Any]:
        """The job's parameters; {} of a job that is skipped or refused."""
        return getattr(self, "_parameters", {})

    @property
    def job_step_ids(self) -> list[int] | None:
        """The ids of all steps in order; None until they are created."""
        return self._job_step_ids

    @property
    def connection(self) -> psycopg.Connection:
        """The worker's connection, in autocommit mode; a step uses this one.

        What a job changes in its session (settings, temporary tables, locks) is gone after it;
        settings are gone after each step.
        """
        return self._worker.lend()

    @property
    def step(self) -> dict[str, Any]:
        """The running step: id, name, object_id, alarm_id, feature_id, parameters, attempts.

        As it was created, or found when the job was resumed; not read again before it runs.
        """
        return self._step

    @property
    def state(self) -> str:
        """The job's state, as far as this worker knows it."""
        return self._outcome.state

    @property
    def next_job(self) -> claims.Job | None:
        """The job that was claimed together with this one's end, None if there was none."""
        return self._outcome.next_job

    # Taking it up.

    def _found(self) -> claims.Job:
        if (job := claims.read(self._worker, self._job_id)) is None:
            raise ValueError(f"there is no job {self._job_id} in job_instances")
        return job

    def _take(self) -> None:
        """Make the job ours, unless the handler has; raise `ValueError` if it cannot be."""
        if self._job.type_name != self._name:
            raise ValueError(f"job {self._job_id} is of type {self._job.type_name!r}, "
                             f"but {type(self).__name__} runs {self._name!r}")
        if self._claimed:
            return
        if self._job.state != "Created":
            raise ValueError(f"job {self._job_id} is in state {self._job.state!r}, not 'Created'")
        if (job := claims.claim_this(self._worker, self._job_id)) is None:
            raise ValueError(f"job {self._job_id} cannot be taken up here: another worker has it, "
                             "or as many of its type run as may (job_types.max_running)")
        self._job = job

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        """Fail the job, with the explanation in its comment, if it cannot be turned into steps."""
        try:
            yield
        except JobTakenOver:
            raise
        except BaseException as exc:
            if not (self._claimed or is_interrupt(exc)
                    or says_nothing_about_the_job(self._worker, exc)):
                refuse(self._worker, self._job_id, exc)
            raise

    def _checked_parameters(self) -> dict[str, Any]:
        parameters = parse(self._job.parameters)
        if problems := parameter_problems(type(self), parameters):
            raise JobRequestError(explain_parameters(problems, self._parameters_schema)
                                  + "; insert a corrected job")
        return parameters

    def _create_database_steps(self) -> None:
        """Create the rows of `_create_steps` and set the job Queued, in one transaction."""
        with self._refusing():
            steps = checked_steps(self._create_steps(), type(self).__name__)
            self._take_back("_create_steps")
            try:
                state, self._job_step_ids = life.queue(
                    self._worker, self._job_id, steps, self._application_name, self._claimed)
            except psycopg.errors.UniqueViolation as exc:
                raise self._has_steps(exc) from None
            # From JSON, so that a step is told the same whether the job is new or resumed.
            wanted = json.loads(steps)
            if len(wanted) != len(self._job_step_ids):
                raise JobRequestError(f"the database took {len(self._job_step_ids)} of "
                                      f"{len(wanted)} steps" + GONE_BY.format(table="job_steps"))
        self._outcome = life.Outcome(state)
        self._todo = (as_created(step_id, position, step) for position, (step_id, step) in
                      enumerate(zip(self._job_step_ids, wanted, strict=True), 1))

    def _has_steps(self, exc: psycopg.errors.UniqueViolation) -> Exception:
        """Return what to say of a job that somebody has set back to Created by hand."""
        if exc.diag.constraint_name != "step_position_is_taken_once":
            return exc
        return JobRequestError(f"it was Created and yet had steps; to run it again: jobctl retry "
                               f"{self._job_id}, with --all every step of it")

    def _load_steps(self) -> None:
        rows = query(self._worker.connection, STEPS_SQL, {"job_id": self._job_id})
        self._job_step_ids = [step_id for step_id, *_ in rows]
        self._failed = [step_id for step_id, *_, state in rows if state == "Failed"]
        self._todo = (dict(zip(STEP, step, strict=True))
                      for *step, state in rows if state not in ("Finished", "Failed"))

    # Running it.

    def run(self) -> list[int]:
        """Run the steps that are left and return the ids of those that failed in this attempt.

        Raise `ValueError` if the steps are not created or the state is not Queued, `JobTakenOver`
        if the job belongs to another worker by now, `psycopg.Error` if the database does not let
        the steps' ends be recorded; the job is then to be put back.
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
        if self.state != "Running":
            self._outcome = life.begin(self._worker, self._job_id, step and step["id"],
                                       self._application_name)
        while step and self.state == "Running":
            following = next(todo, None)
            self._step = step | {"attempts": step["attempts"] + 1}
            self._outcome = self._work(step["id"], following and following["id"])
            step = following
        if self.state == "Running":  # there was no step
            self._outcome = self._end(life.NO_STEP)
        return self._failed

    def _work(self, step_id: int, next_id: int | None) -> life.Outcome:
        """Run a step and record its end, and with it the next one's begin or the job's end."""
        in_transaction = (self._worker.connection.transaction() if self._step_in_transaction
                          else contextlib.nullcontext())
        try:
            with in_transaction:
                result = self._run_limited(step_id)
                return self._record(step_id, StepEnd("Finished", result=result), next_id)
        except _StepFailed as failed:
            wrong = failed.exc
        except psycopg.Error as exc:  # our own statement, or a COMMIT that refused its writes
            if says_nothing_about_the_job(self._worker, exc):
                raise
            wrong = exc
        leave_no_transaction(self._worker)
        self._failed.append(step_id)
        return self._record(step_id, StepEnd("Failed", self._explain(wrong)), next_id)

    def _run_limited(self, step_id: int) -> str | None:
        """Run a step and return its result as JSON text; raise `_StepFailed` if it went wrong."""
        try:
            with time_limit(self._job.step_timeout):
                text = checked_result(self._run_step(step_id))
            self._take_back("The step", self._step_in_transaction)
        except BaseException as exc:
            if is_interrupt(exc):
                raise
            if self._step_in_transaction and is_active(self._worker):
                self._worker.connection.close()  # or its end would wait for what still runs
            if self._worker.connection.broken:  # not the step's fault; it will run again
                raise psycopg.OperationalError(
                    f"connection lost in step {step_id}: {said(exc)}") from exc
            raise _StepFailed(exc) from None
        log.debug("job=%d step=%d state=Finished name=%r", self._job_id, step_id,
                  self._step["name"])
        return text

    def _explain(self, exc: BaseException) -> str:
        """Return the comment of the running step that failed with `exc`, and write the log."""
        known = isinstance(exc, JobStepError | JobRequestError | StepTimeout)
        log.error("job=%d step=%d state=Failed name=%r: %s", self._job_id, self._step["id"],
                  self._step["name"], said(exc), exc_info=None if known else exc)
        return clean(said(exc) if known else unknown(exc), self._worker.connection)

    def _take_back(self, who: str, in_transaction: bool = False) -> None:
        """Raise `JobStepError` if a job file has left the worker's connection as nobody may."""
        if left := self._worker.left(in_transaction):
            raise JobStepError(f"{who} {left}")

    def _record(self, step_id: int, end: StepEnd, next_id: int | None) -> life.Outcome:
        """Write a step's end and what follows."""
        if next_id is None:
            return self._end(end)
        if self._worker.directions.stopping():
            return life.hand_back(self._worker, self._job_id, end)
        return life.end_step(self._worker, self._job_id, step_id, end, next_id)

    def _end(self, step: StepEnd) -> life.Outcome:
        """End a job all of whose steps have run, or put it back to be tried again."""
        failed, total = len(self._failed), len(self._job_step_ids or ())
        if not failed:
            comment = None if total else "No steps: there was nothing to do"
            return life.end(self._worker, self._job_id, step, "Finished", comment)
        comment = f"{failed} ({100 * failed / total:.2f}%) steps failed"
        attempt, of = self._job.attempts + 1, self._job.max_attempts
        if attempt < of:
            return life.try_again(
                self._worker, self._job_id, step,
                f"{comment}, attempt {attempt} of {of}; they run again after run_after")
        return life.end(self._worker, self._job_id, step, "Failed", comment)


def as_created(step_id: int, position: int, given: dict[str, Any]) -> dict[str, Any]:
    """Return a step that `_create_steps` gave as QUEUE_SQL has written it."""
    step = STEP | {"id": step_id, "name": f"step {position}", "parameters": {}}
    return step | {column: value for column, value in given.items() if value is not None}


def take_up(worker: Worker, job: claims.Job, skip_test: bool = True) -> JobInstance:
    """Construct the class of a job that `worker` has claimed, within the limit of a step.

    Raise what the class raises, `StepTimeout` at the limit; the job is then to be refused.
    """
    use_worker(worker)
    claimed = _CLAIMED.set(job)
    try:
        with time_limit(job.step_timeout):
            return JOB_TYPES[job.type_name](job.id, skip_test=skip_test)
    finally:
        _CLAIMED.reset(claimed)


def refuse(worker: Worker, job_id: int, exc: BaseException) -> None:
    """Fail a job that cannot be turned into steps, with the explanation as its comment.

    Raise `JobTakenOver` if it is not ours any more.
    """
    known = isinstance(exc, JobRequestError | JobStepError | StepTimeout)
    leave_no_transaction(worker)
    life.refuse(worker, job_id, clean(said(exc) if known else unknown(exc), worker.connection))
    log.error("job=%d state=Failed: %s", job_id, said(exc), exc_info=None if known else exc)


def leave_no_transaction(worker: Worker) -> None:
    """Roll back what a job left open, on a new connection if it has closed or blocked its own.

    Raise `psycopg.OperationalError` if it cannot be.
    """
    if worker.connection.broken:
        worker.connection.rollback()  # which says so
    if worker.connection.closed or is_active(worker):  # nobody can say what would come back next
        worker.reconnect(go_on=True)
    elif worker.connection.info.transaction_status:
        worker.connection.rollback()


def is_active(worker: Worker) -> bool:
    return worker.connection.info.transaction_status == psycopg.pq.TransactionStatus.ACTIVE


def says_nothing_about_the_job(worker: Worker, exc: Any) -> bool:
    """Whether an error is the database's alone, so that the job is to be put back, not Failed.

    A connection that cannot be had is the job's business if it is not the worker's.
    """
    return worker.connection.broken or (
        is_passing(exc) and (exc.sqlstate is not None or worker.connection.closed))


def unknown(exc: BaseException) -> str:
    return f"Unknown error, please check the logs: {said(exc)}"


def parameter_problems(job_type: type[JobInstance], parameters: Any) -> list[str]:
    """Return all that is wrong with `parameters`, each as '$.path: what'; [] if they fit."""
    problems = []
    if job_type._parameters_schema is not JobInstance._parameters_schema:
        problems = schema_problems(parameters, job_type._parameters_schema)
    if isinstance(parameters, dict):
        problems += period_problems(parameters)
        if not problems:  # what follows may rely on the schema
            problems = job_type._check_parameters(parameters) or []
    return [problems] if isinstance(problems, str) else list(problems)
