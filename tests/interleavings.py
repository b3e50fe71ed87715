"""Every order in which the statements of workers and operators can follow one another, tried.

One state change is one statement in one transaction, so what several workers and operators can
do to a job is a sequence of statements. Actors (gates.py) stop before each; `Run` lets one go at
a time. Who then waits for a lock is seen in the server's lock table (no sleeping for luck), and
others go on. A schedule is a list of choices (actor, what becomes of its next statement):

    go       it is carried out
    lose     it is carried out, and the session dies before it tells
    cut      the session has been ended before it; the worker comes back, sooner or later
    ghost    the connection is cut, but the server does not notice
    die      the worker is gone
    stop     SIGTERM: the worker hands its job back
    expire   the lock it waits for is not had in time

`explore` walks through all schedules of a scene, depth first, replaying a prefix from an empty
database for each turning. A state is the rows, the locks and what each actor has seen since it
last began anew; one that was seen is not explored again.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import socket
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NoReturn

import psycopg
from gates import Actor, Session, Stage

if TYPE_CHECKING:
    from scenes import Rows, Scene

FAULTS = ("lose", "cut", "ghost", "die", "stop")
# Whose answer may be lost without anybody noticing: as if the session had ended before.
READING = {"LOOK_SQL", "ORPHANS_SQL", "OWN_SQL", "READ_SQL", "STEPS_SQL", "STATE_SQL", "LOCK_SQL",
           "LOCK_ORPHAN_SQL", "LOCK_STEP_SQL", "NEXT_STEP_SQL"}
PATIENCE = 0.005  # seconds until we look whether a statement waits for a lock
HANGING = 30.0    # seconds after which an actor that is neither back nor waiting is an error


class Run:
    """One play of a scene, from its beginning, choice by choice."""

    def __init__(self, stage: Stage, scene: Scene) -> None:
        self.stage, self.scene = stage, scene
        self.problems: list[str] = []
        self.path: list[str] = []  # for people
        self.sessions: list[Session] = []
        self.ghosts: list[tuple[int, int]] = []  # server process, socket that keeps it alive
        self.faults = scene.faults_left
        stage.pool += stage.parked
        stage.parked = []
        scene.reset(stage.watch)
        self.actors: dict[str, Actor] = {}
        for name, act in scene.actors():
            self.actors[name] = Actor(self, name, act)
        for actor in self.actors.values():
            actor.start()
            self._settle(actor)

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: Any) -> None:
        """Have everybody gone, whatever is half done."""
        for actor in sorted(self.actors.values(), key=lambda actor: not actor.is_blocked):
            if not actor.is_done:
                self._die(actor)
        for session in self.sessions:
            self.stage.park(session)
        self.notice()
        for actor in self.actors.values():
            if actor.handler:
                actor.handler.close_pipe()

    def notice(self) -> None:
        """Have the server notice that nobody is at the other end of a ghost's connection."""
        for pid, fd in self.ghosts:
            os.close(fd)
            self.stage.end(pid)
        self.ghosts = []

    def choices(self) -> list[tuple[str, str]]:
        """Return what can happen next: first what goes on as it is, then what goes wrong."""
        there = [actor for actor in self.actors.values() if not actor.is_done]
        found = [(actor.name, "expire" if actor.is_blocked else "go") for actor in there
                 if not actor.is_blocked or actor.standing == "LOCK_SQL"]
        if self.faults and found:
            found += [(actor.name, fault) for actor in there if actor.name in self.scene.faulty
                      for fault in self.scene.faults if self._can(actor, fault)]
        return found

    def _can(self, actor: Actor, fault: str) -> bool:
        if fault == "stop":
            return not actor.is_stopped
        if actor.session.is_cut:
            return False
        if fault == "lose":  # else it is the same as "cut"
            status, idle = actor.session.pgconn.transaction_status, 0
            return not actor.is_blocked and (actor.standing == "COMMIT" or (
                status == idle and actor.standing not in READING))
        return True

    def until(self, name: str, standing: str = "") -> None:
        """Let an actor go on until it stands there, has ended, or waits for a lock."""
        actor = self.actors[name]
        while not (actor.is_done or actor.is_blocked or actor.standing == standing):
            self.do(name, "go")

    def do(self, name: str, order: str) -> None:
        """Let it happen, and wait until everybody stands again or waits for a lock."""
        actor = self.actors[name]
        assert not actor.is_done, f"{name} has gone: {self.path}"
        self.path.append(f"{name} {order} {actor.standing}")
        self.faults -= order in FAULTS
        if order in ("go", "lose"):
            actor.order = order
            actor.resume.release()
            self._settle(actor)
        else:
            getattr(self, f"_{order}")(actor)
        while any(self._settle(other) for other in self.actors.values() if other.is_blocked):
            pass

    def _settle(self, actor: Actor) -> bool:
        """Wait until the actor stands at its next statement or has ended; False if blocked."""
        until = time.monotonic() + HANGING
        actor.is_blocked = False
        while not actor.arrived.acquire(timeout=PATIENCE):
            if actor.session and not self.stage.blocking(actor.session).isdisjoint(
                    session.pid for session in self.sessions):
                actor.is_blocked = True
                return False
            if time.monotonic() > until:
                self._hangs(actor)
        return True

    def _cut(self, actor: Actor) -> None:
        self.stage.end(actor.session.pid)
        actor.session.is_cut = True
        actor.seen.append("cut")
        if actor.is_blocked:
            self._arrive(actor)

    def _arrive(self, actor: Actor) -> None:
        """Wait for an actor whose statement ends now, whatever it waited for."""
        if not actor.arrived.acquire(timeout=HANGING):
            self._hangs(actor)
        actor.is_blocked = False

    def _hangs(self, actor: Actor) -> NoReturn:
        raise AssertionError(f"{actor.name} hangs at {actor.standing} after {self.path}; "
                             f"until then wrong: {self.problems}")

    def _ghost(self, actor: Actor) -> None:
        """Leave the server with a connection that nobody is at the other end of."""
        fd = actor.session.pgconn.socket
        self.ghosts.append((actor.session.pid, os.dup(fd)))
        near, far = socket.socketpair()
        far.close()
        os.dup2(near.detach(), fd)
        actor.session.is_cut = True
        actor.seen.append("ghost")

    def _die(self, actor: Actor) -> None:
        """Have the actor's process gone, and its sessions with it.

        They are only cleaned, to be used again, unless somebody waits: he might end them.
        """
        actor.is_dead = True
        if any(other.is_blocked for other in self.actors.values()):
            for session in self._sessions_of(actor):
                session.is_cut = True
                self.stage.end(session.pid)
        if not actor.is_blocked:
            actor.resume.release()
        actor.join(HANGING)
        actor.is_blocked = False
        for session in self._sessions_of(actor):
            self.stage.park(session)
        actor.seen = ["dead"]

    def _sessions_of(self, actor: Actor) -> list[Session]:
        return [session for session in self.sessions if session.actor is actor
                and session.pgconn.status == psycopg.pq.ConnStatus.OK]

    def _stop(self, actor: Actor) -> None:
        actor.handler.stop(signal.SIGTERM, None)
        actor.is_stopped = True

    def _expire(self, actor: Actor) -> None:
        actor.order = "expire"
        self.stage.watch.execute("SELECT pg_cancel_backend(%s)", [actor.session.pid])
        self._arrive(actor)

    def key(self, rows: str) -> bytes:
        """Return what tells this state from all others."""
        standing = [(actor.name, actor.is_done, actor.is_blocked, actor.is_stopped, actor.standing,
                     actor.seen, sorted(actor.owned)) for actor in self.actors.values()]
        return hashlib.blake2b(repr((rows, standing, self.faults, len(self.ghosts))).encode(),
                               digest_size=16).digest()


@dataclass(frozen=True)
class Doer:
    """Who may have changed something, as he was before: his worker's id, and what he was about."""

    actor: Actor
    mine: set[int]
    recovers: bool


@dataclass
class Explored:
    """What `explore` has seen: how much, and the first thing that was wrong."""

    states: int = 0
    transitions: int = 0
    schedules: int = 0
    problems: list[str] = field(default_factory=list)
    path: list[str] = field(default_factory=list)
    is_complete: bool = False

    def __str__(self) -> str:
        return (f"{self.states} states, {self.transitions} transitions, "
                f"{self.schedules} schedules")


def explore(stage: Stage, scene: Scene, until: float = float("inf"),
            chance: random.Random | None = None) -> Explored:
    """Try every schedule of a scene; stop at a problem.

    Or as many as can be tried until that moment of time.monotonic(), chosen by `chance`.
    """
    explored, seen = Explored(), set()
    turnings: list[Any] = [([], {})]
    while turnings and not explored.problems and time.monotonic() < until:
        explored.schedules += 1
        if chance:
            n = chance.randrange(len(turnings))
            turnings[n], turnings[-1] = turnings[-1], turnings[n]
        with Run(stage, scene) as run:
            _follow(run, *turnings.pop(), turnings, seen, explored)
            explored.problems += run.problems
            explored.path = run.path
    explored.states, explored.is_complete = len(seen), not turnings
    return explored


def _follow(run: Run, path: list[tuple[str, str]], owned: dict[str, set[int]], turnings: list[Any],
            seen: set[bytes], explored: Explored) -> None:
    """Replay a prefix, then go on to a state that was seen or to the end; note the turnings."""
    for choice in path[:-1]:
        run.do(*choice)
    for name, jobs_owned in owned.items():
        run.actors[name].owned = jobs_owned
    rows = run.scene.rows(run.stage.watch)
    if path:
        rows = _try(run, path[-1], rows, explored)
    path = list(path)
    while not run.problems and (key := run.key(rows.text)) not in seen:
        seen.add(key)
        choices = run.choices()
        if not choices:
            run.problems += run.scene.wrong_at_the_end(run)
            return
        owned = {actor.name: actor.owned for actor in run.actors.values()}
        turnings += [([*path, other], owned) for other in choices[1:]]
        path.append(choices[0])
        rows = _try(run, choices[0], rows, explored)


def _try(run: Run, choice: tuple[str, str], before: Rows, explored: Explored) -> Rows:
    """Let it happen and see what has changed; whoever waited may have gone on by it, too."""
    explored.transitions += 1
    doers = [Doer(actor, set(actor.ids[-1:]), actor.recovers) for actor in run.actors.values()
             if actor.is_blocked or actor.name == choice[0]]
    run.do(*choice)
    after = run.scene.rows(run.stage.watch)
    run.problems += run.scene.wrong(before, after, doers)
    return after
