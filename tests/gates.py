"""Gates: sessions whose round trips wait for their turn, and the actors behind them.

Actors are threads that run the project's own functions on a real PostgreSQL. Each round trip stops
at a gate until whoever directs them (interleavings.py) lets it go. What touches nothing that
others can see is let through.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import re
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import psycopg

import claims
import control
import handler
import jobs
import life
import perfdb
import session
import worker

if TYPE_CHECKING:
    from interleavings import Run

MODULES = (claims, life, worker, jobs, control, handler)
# What touches nothing that others see is let through: it commutes with whatever they do.
SHARED = re.compile(r"\b(job_instances|job_steps|job_workers|trace|pg_advisory|pg_terminate)")
# Nor does this: rows that are the actor's own or that it has locked, looks that are made again.
COMMUTING = {"INSERT INTO trace", "REGISTER_SQL", "LEAVE_SQL", "OWN_SQL",
             "NEXT_STEP_SQL", "STEP_BACK_SQL", "JOB_BACK_SQL", "JOB_POISON_SQL"}
MOMENT_OID = 1184   # timestamptz: the one thing that differs each time
ARROWS = {name for name, value in vars(life).items()
          if isinstance(value, types.FunctionType) and not name.startswith("_")}
EXPECTED = ("57P01", "55P03", "23505")  # session ended, lock not had, unique_key taken
CLEAN_SQL = b"ROLLBACK; SELECT pg_advisory_unlock_all(); UNLISTEN *; RESET ALL"


# The turn of a limited type is not waited for long, so whoever waits for it is as good as back.
BLOCKING_SQL = """
SELECT CASE WHEN NOT EXISTS (
                     SELECT FROM pg_locks
                      WHERE pid = %s AND %s AND NOT granted
                        AND locktype = 'advisory' AND objsubid = 2)
            THEN pg_blocking_pids(%s) ELSE '{}' END
"""


class Died(BaseException):
    """The actor's process is gone: nothing more of it is carried out."""


@dataclass(frozen=True)
class Trip:
    """A round trip to the server: its name, its parameters, and the cursor that will know more."""

    name: str
    params: Any = None
    cursor: Any = None

    def told(self) -> tuple[Any, ...]:
        """Return what the server has answered, without moments."""
        result = self.cursor and self.cursor.pgresult
        if not result:
            return ()
        columns = range(2 if self.name == "LOOK_SQL" else result.nfields)
        return tuple(b"then" if result.ftype(c) == MOMENT_OID else result.get_value(r, c)
                     for r in range(result.ntuples) for c in columns)


class Session(psycopg.Connection):
    """A connection whose round trips wait for their turn."""

    actor: Actor | None = None
    tripping: list[Trip] | None = None  # a pipeline's
    is_cut = False
    pid = 0

    def wait(self, gen: Any, *args: Any, **kwargs: Any) -> Any:
        if self.actor and self.actor.is_dead:
            raise Died
        trip = self.actor and trip_of(gen)
        if trip and self.tripping is not None:
            self.tripping.append(trip)
        elif trip and (self.actor.run_.scene.fine or trip.name not in COMMUTING):
            with self.actor.tripping(self, [trip]):
                return super().wait(gen, *args, **kwargs)
        return super().wait(gen, *args, **kwargs)

    @contextlib.contextmanager
    def pipeline(self) -> Iterator[Any]:
        if self.actor is None:
            with super().pipeline() as pipeline:
                yield pipeline
            return
        self.tripping = []
        try:
            with self.actor.tripping(self, self.tripping), super().pipeline() as pipeline:
                yield pipeline
        finally:
            self.tripping = None

    def close(self) -> None:
        if self.actor and not self.actor.is_dead:
            self.actor.run_.stage.park(self)
        super().close()


def trip_of(gen: Any) -> Trip | None:
    """Return the round trip a generator of psycopg makes, None if it matters to nobody else."""
    kind, known = gen.__name__, gen.gi_frame.f_locals
    if kind == "_execute_gen":
        if name := name_of(known["query"]):
            return Trip(name, known["params"], known["self"])
    elif kind in ("_exit_gen", "_commit_gen", "_rollback_gen"):
        return Trip("ROLLBACK" if kind == "_rollback_gen" or known.get("exc_val") else "COMMIT")
    return None


@functools.cache
def name_of(sql: str) -> str | None:
    """Return the name of a statement, None if others cannot tell that it was run."""
    if not SHARED.search(sql) or sql.startswith("LISTEN") or sql == perfdb.FITNESS_SQL:
        return None
    return Stage.names.get(sql) or " ".join(sql.split()[:3])


class Actor(threading.Thread):
    """Somebody who acts: a handler with its worker, or an operator."""

    def __init__(self, run: Run, name: str, act: Callable[[Actor], Any]) -> None:
        super().__init__(name=name, daemon=True)
        self.run_ = run
        self.act = act
        self.arrived, self.resume = threading.Lock(), threading.Lock()
        self.arrived.acquire()
        self.resume.acquire()
        self.order = "go"
        self.session: Session | None = None
        self.trips: list[Trip] = []  # what it is about to do
        self.seen: list[Any] = []    # what it has been told since it last began anew
        self.ids: list[int] = []     # under which its workers were registered
        self.owned: set[int] = set()  # jobs it had at some moment of the transaction it is in
        self.was_in_transaction = False  # at its last round trip, and after it
        self.recovers = False        # it stands in the code that puts jobs back
        self.calls = ""              # which function of life.py it is in
        self.is_blocked = self.is_dead = self.is_stopped = self.is_done = False
        self.may_be_ended = False    # by somebody who finds that it hangs
        self.handler: Directed | None = None
        self.result: Any = None

    def run(self) -> None:
        try:
            self.result = self.act(self)
        except Died:
            pass
        except BaseException as exc:
            self.run_.problems.append(f"{self.name} ended by {type(exc).__name__}: {exc}")
        finally:
            self.is_done = True
            self.arrived.release()

    @contextlib.contextmanager
    def tripping(self, session: Session, trips: list[Trip]) -> Iterator[None]:
        """Wait for our turn, make the round trip, and lose the answer if that is the order."""
        if self.is_dead:
            raise Died
        self.session, self.trips = session, trips
        callers = list(callers_of(sys._getframe(3)))
        self.recovers = not {"_put_back", "end_overrun"}.isdisjoint(callers)
        self.calls = next((name for name in callers if name in ARROWS), callers[0])
        self.arrived.release()
        self.resume.acquire()
        if self.is_dead:
            raise Died
        order = self.order
        self.was_in_transaction = bool(session.pgconn.transaction_status) and not any(
            trip.name in ("COMMIT", "ROLLBACK") for trip in trips)
        try:
            yield
        except psycopg.Error as exc:
            self._note_failure(trips, exc)
            raise
        self.seen += [(trip.name, told_of(trip.params), trip.told()) for trip in trips]
        if trips[0].name == "END_FORMER_SESSIONS_SQL" and trips[0].told():
            self.run_.stage.wait_until_free(trips[0].params["worker_id"])
        if order == "lose":
            self.run_.stage.end(session.pid)
            session.pgconn.finish()
            self.seen.append("lost")
            raise psycopg.OperationalError("the connection was lost before the answer came")

    def _note_failure(self, trips: list[Trip], exc: psycopg.Error) -> None:
        self.seen.append((*(trip.name for trip in trips), "failed", exc.sqlstate))
        if self.is_dead:
            raise Died
        if self.order == "expire" and exc.sqlstate == "57014":
            raise psycopg.errors.LockNotAvailable("not had in time")
        if (exc.sqlstate and exc.sqlstate not in EXPECTED) or (
                exc.sqlstate == "57P01" and not self.session.is_cut and not self.may_be_ended):
            self.run_.problems.append(f"{self.name}: {type(exc).__name__}: {exc}")

    @property
    def standing(self) -> str:
        """Where it stands, for people."""
        return "+".join(trip.name for trip in self.trips) or self.calls


def callers_of(frame: types.FrameType | None) -> Iterator[str]:
    while frame:
        yield frame.f_code.co_name
        frame = frame.f_back


def told_of(params: Any) -> Any:
    """Return parameters without what differs each time."""
    if not isinstance(params, dict):
        return repr(params)
    return repr({key: value for key, value in params.items() if key not in ("former", "pid")})


class Directed(handler.JobHandler):
    """A handler whose waits take no time and which looks after everything in every turn."""

    def __init__(self, dsn: str, **kwargs: Any) -> None:
        super().__init__(dsn, once=True, **kwargs)
        self._overruns_at = float("inf")
        self._pipe = os.fstat(self._wakeup).st_ino

    def close_pipe(self) -> None:
        """Close what a handler leaves open that has died; not what has got its number since."""
        for fd in (self._wakeup, self._wakeup_end):
            with contextlib.suppress(OSError):
                if os.fstat(fd).st_ino == self._pipe:
                    os.close(fd)

    def _sleep(self, *_: Any) -> bool:
        return False

    def _be_there(self) -> None:
        """The top of a turn: of what was before, only this and the job in hand count."""
        if isinstance(actor := threading.current_thread(), Actor):
            job = sys._getframe(1).f_locals.get("job")
            actor.seen = [("turn", self._setbacks, self._blames, self._introduced, repr(job),
                           self.worker and (self.worker.id, self.worker.connection.closed))]
        super()._be_there()


@dataclass
class Stage:
    """A database for many short plays: sessions that are used again, and one that watches."""

    dsn: str
    names = {}
    pool: list[tuple[Any, Any]] = field(default_factory=list)  # pgconn, what it has prepared
    parked: list[tuple[Any, Any]] = field(default_factory=list)
    wait_limit: str = ""

    def __enter__(self) -> Stage:
        Stage.names = {text: name for module in MODULES for name, text in vars(module).items()
                       if name.isupper() and isinstance(text, str)}
        self.watch = psycopg.connect(self.dsn, autocommit=True, prepare_threshold=0)
        self._limit_waits("1ms")
        self._patches = contextlib.ExitStack()
        for target, name, value in (
                (psycopg, "connect", self._connect), (worker, "secrets", self),
                (session, "PLANS_SECONDS", float("inf")), (worker, "LOCK_WAIT", "1h"),
                (handler, "LOOK_SECONDS", 0.0), (handler, "LOOKS_PER_SECOND", float("inf")),
                (signal, "set_wakeup_fd", lambda *_, **__: -1)):
            self._patches.enter_context(patch.object(target, name, value))
        logging.disable(logging.CRITICAL)
        return self

    def __exit__(self, *_: Any) -> None:
        logging.disable(logging.NOTSET)
        self._patches.close()
        self._limit_waits(self.wait_limit)
        for pgconn, _prepared in self.pool + self.parked:
            pgconn.finish()
        self.watch.close()

    def _limit_waits(self, wait: str) -> None:
        """Set how long a claim waits for the turn of a limited type, if not for ever."""
        config = self.watch.execute("SELECT proconfig FROM pg_proc "
                                    "WHERE proname = 'job_type_has_room'").fetchone()[0] or ()
        for setting in config:
            if setting.startswith("lock_timeout="):
                self.wait_limit = setting.partition("=")[2]
                self.watch.execute("ALTER FUNCTION job_type_has_room(int, int) "
                                   f"SET lock_timeout = '{wait}'")

    def randbits(self, _bits: int) -> int:
        """Number the workers by actor instead of at random, so that a replay is the same."""
        actor = threading.current_thread()
        if not isinstance(actor, Actor):
            return 8999
        actor.ids.append(1000 * (1 + list(actor.run_.actors).index(actor.name)) + len(actor.ids))
        return actor.ids[-1] - 1

    def _connect(self, *args: Any, **kwargs: Any) -> Session:
        if self.pool:
            pgconn, prepared = self.pool.pop()
            session = Session(pgconn)
            session._autocommit, session._prepared = True, prepared
        else:
            session = Session.connect(*args, **kwargs)
        session.pid = session.pgconn.backend_pid
        if isinstance(actor := threading.current_thread(), Actor):
            session.actor = actor
            actor.run_.sessions.append(session)
        return session

    def park(self, session: Session) -> None:
        """End a session as far as anybody can see; it serves again in the next play."""
        if session.is_cut or session.pgconn.status != psycopg.pq.ConnStatus.OK:
            return
        if session.pgconn.exec_(CLEAN_SQL).status == psycopg.pq.ExecStatus.COMMAND_OK:
            self.parked.append((session.pgconn, session._prepared))
        else:
            session.pgconn.finish()  # it was ended by somebody
        session.pgconn = psycopg.pq.PGconn()

    def end(self, pid: int) -> None:
        """End a session on the server and wait until its locks are free."""
        self.watch.execute("SELECT pg_terminate_backend(%s)", [pid])
        while self.watch.execute("SELECT pid FROM pg_stat_get_activity(%s)", [pid]).fetchone():
            pass

    def wait_until_free(self, worker_id: int) -> None:
        """Wait until sessions that have been told to end have let a worker's lock go."""
        until = time.monotonic() + 2
        while time.monotonic() < until and self.watch.execute(
                "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 1 "
                "AND granted AND classid::bigint << 32 | objid::bigint = %s",
                [worker_id]).fetchone():
            pass

    def blocking(self, session: Session) -> set[int]:
        """Return the server processes a session's statement waits for, by the lock table."""
        return set(self.watch.execute(BLOCKING_SQL, [session.pid, bool(self.wait_limit),
                                                     session.pid]).fetchone()[0])


