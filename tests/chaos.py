"""make chaos: break everything that can break while jobs run, and count what was lost.

    python tests/chaos.py [WORD...]      only the faults in whose names a WORD stands

For each fault a PostgreSQL of its own, two handlers with two workers each and some jobs of short
transactional steps; every step writes one row (its effect) in the transaction that marks it
Finished. Printed per fault: times injected, jobs lost (not ended as they should), effects doubled,
late writes refused (by workers that had been taken over meanwhile) and the longest time from a
fault until its job's next step was done, beside what that may be. Ends with status 1 if a job was
lost, an effect doubled, something took too long or went wrong otherwise. About six minutes.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import psycopg  # noqa: E402
import sample_jobs  # noqa: E402, F401
from embedded_pg import Server  # noqa: E402
from faults import FAULTS, Fault  # noqa: E402
from helpers import wait_for  # noqa: E402

import control  # noqa: E402
import perfdb  # noqa: E402
import tables  # noqa: E402

JOBS, STEPS, STEP_SECONDS = 8, 12, 0.1
END_SECONDS = 60  # for all jobs to end once the faults are over

HEADS = ("fault", "injected", "jobs lost", "effects doubled", "late writes refused",
         "going on after (s)", "at most (s)")

# A job with a running step, chosen at random.
RUNNING_SQL = """
SELECT j.id, w.id, w.pid, w.backend_pid
  FROM job_instances j
  JOIN job_workers w ON w.id = j.worker_id
 WHERE EXISTS (SELECT FROM job_steps s WHERE s.job_instance_id = j.id AND s.state = 'Running')
   AND (%(pid)s::int IS NULL OR w.pid = %(pid)s)
 ORDER BY random()
 LIMIT 1
"""
EFFECTS_SQL = "SELECT count(*) FROM trace WHERE job_id = COALESCE(%(job_id)s, job_id)"
UNENDED_SQL = "SELECT count(*) FROM job_instances WHERE state NOT IN ('Finished', 'Failed')"
DOUBLED_SQL = "SELECT count(*) - count(DISTINCT step_id) FROM trace"
MISSING_SQL = """
SELECT count(*)
  FROM job_steps s
 WHERE state = 'Finished'
   AND NOT EXISTS (SELECT FROM trace t WHERE t.step_id = s.id)
"""
BLAMED_SQL = """
SELECT j.id, j.state, j.comment, s.position, s.attempts, s.comment
  FROM job_instances j
  LEFT JOIN job_steps s ON s.job_instance_id = j.id
 WHERE j.state = 'Failed'
    OR s.attempts > 1
 LIMIT 3
"""


class Chaos:
    """A server, its handlers, and what happened to the jobs."""

    def __init__(self, server: Server, directory: Path, stack: contextlib.ExitStack) -> None:
        self.server = server
        self.dsn = server.dsn()
        self.log = directory / "handlers.log"
        self.stack = stack  # what a fault sets up for the time of the run
        self.handlers: list[subprocess.Popen] = []
        self.injected, self.longest = 0, 0.0
        self._connection: psycopg.Connection | None = None
        self.log.touch()
        self.rows((ROOT / "schema.sql").read_text())
        self.rows("CREATE TABLE trace (job_id bigint, step_id bigint)")
        control.write_types(self._connection, ["Transactional"])

    # The database.

    def rows(self, query: str, params: dict[str, Any] | None = None) -> list[tuple]:
        """Ask the database, which may be away for a moment."""
        for _ in range(400):
            with contextlib.suppress(psycopg.OperationalError):
                if self._connection is None or self._connection.closed:
                    self._connection = perfdb.connect(self.dsn)
                return perfdb.query(self._connection, query, params)
            time.sleep(0.05)
        raise AssertionError("the server does not come back")

    def move(self, server: Server) -> None:
        """Go on with another server."""
        self.server, self.dsn, self._connection = server, server.dsn(), None

    def ask(self, count: int = JOBS, what: str = "sleep", seconds: float = STEP_SECONDS,
            steps: int = STEPS) -> int:
        """Ask for jobs; return how many steps they have in all."""
        self.rows("SELECT 1")  # so that there is a connection
        control.create_jobs(self._connection, "Transactional", count * [
            {"steps": [what] * steps, "sleep": seconds}])
        return count * steps

    def running(self, pid: int | None = None) -> tuple[int, int, int, int]:
        """Return (job, worker, pid, backend_pid) of a job with a running step, of worker `pid`."""
        if self.rows(UNENDED_SQL)[0][0] < JOBS // 2:
            self.ask()  # while the faults were mended the others have gone on
        return wait_for(lambda: self.rows(RUNNING_SQL, {"pid": pid}), what="a running job")[0]

    def effects(self, job_id: int | None = None) -> int:
        """Return how many steps of a job, or of all, have left their effect."""
        return self.rows(EFFECTS_SQL, {"job_id": job_id})[0][0]

    # Handlers.

    def start(self, *args: str, dsn: str = "") -> subprocess.Popen:
        with self.log.open("ab") as log:
            self.handlers.append(subprocess.Popen(
                [sys.executable, str(ROOT / "handler.py"), "--module", "sample_jobs", *args],
                stdout=log, stderr=log, env=os.environ | {
                    "PERFDB_DSN": dsn or self.dsn, "PYTHONPATH": str(ROOT / "tests")}))
        return self.handlers[-1]

    def start_two(self, dsn: str = "") -> None:
        for _ in range(2):
            self.start("--workers", "2", dsn=dsn)

    def end_handlers(self) -> None:
        """Tell all handlers to stop, and wait until they have."""
        for handler in self.handlers:
            handler.terminate()
        wait_for(lambda: all(handler.poll() is not None for handler in self.handlers),
                 what="the handlers to stop")
        self.handlers.clear()

    def kill_all(self) -> None:
        for handler in self.handlers:
            handler.kill()
            handler.wait()
        for (pid,) in self.rows("SELECT pid FROM job_workers"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    # What happens, and what has.

    def inject(self, fault: Callable[[], Any], job_id: int | None = None) -> None:
        """Do the damage and wait until the job's next step is done, or any job's."""
        before = self.effects(job_id)
        fault()
        begun = time.monotonic()
        self.go_on(before, job_id)
        self.note(time.monotonic() - begun)

    def go_on(self, before: int, job_id: int | None = None, timeout: float = 40) -> None:
        """Wait until a job, or any, has left more effects than `before`."""
        wait_for(lambda: self.effects(job_id) > before, timeout,
                 f"job {job_id} to go on" if job_id else "the jobs to go on")

    def note(self, seconds: float) -> None:
        """Count a fault, and how long it was felt."""
        self.injected += 1
        self.longest = max(self.longest, seconds)

    def check(self, is_right: bool, text: str) -> None:
        if not is_right:
            raise AssertionError(text)

    def let_end(self) -> None:
        """Wait until all jobs have ended, END_SECONDS at most."""
        with contextlib.suppress(AssertionError):
            wait_for(lambda: self.rows(UNENDED_SQL) == [(0,)], END_SECONDS)

    def blame_nobody(self) -> None:
        """Let all jobs end; no job may have Failed, and no step may have been charged a death."""
        self.let_end()
        blamed = self.rows(BLAMED_SQL)
        self.check(not blamed, f"blamed: {blamed}")

    def losses(self) -> tuple[int, int]:
        """Return (jobs lost, effects doubled)."""
        unended, missing, doubled = (
            self.rows(sql)[0][0] for sql in (UNENDED_SQL, MISSING_SQL, DOUBLED_SQL))
        return unended + missing, doubled

    def refused(self) -> int:
        return self.log.read_text().count("dropped: ")

    def statuses(self) -> list[int]:
        """Return how handlers have ended that were not told to."""
        return [status for handler in self.handlers if (status := handler.poll())]


def run(fault: Fault) -> tuple[list[Any], str]:
    """Run one fault on a server of its own; return its line of the table, and what went wrong."""
    with (tempfile.TemporaryDirectory(prefix="perfdb-chaos-") as directory,
          Server({"fsync": "off"}) as server, contextlib.ExitStack() as stack):
        chaos = Chaos(server, Path(directory), stack)
        try:
            return watch(chaos, fault)
        finally:
            chaos.kill_all()


def watch(chaos: Chaos, fault: Fault) -> tuple[list[Any], str]:
    """Let jobs run, inject the fault, let the jobs end, and look what there is."""
    chaos.ask()
    chaos.start_two()
    problem = ""
    try:
        fault.inject(chaos)
    except AssertionError as exc:
        problem = str(exc)
    chaos.let_end()
    lost, doubled = chaos.losses()
    if not problem and chaos.longest > fault.longest_seconds:
        problem = "took too long"
    if not problem and (statuses := chaos.statuses()):
        problem = f"handlers ended with {statuses}"
    if problem or lost or doubled:
        problem = f"{problem or 'see the table'}\n{chaos.log.read_text()[-4000:]}"
    return [fault.name, chaos.injected, lost, doubled, chaos.refused(), round(chaos.longest, 2),
            fault.longest_seconds], problem


def main(words: Sequence[str]) -> int:
    begun, lines, problems = time.monotonic(), [], []
    faults = [fault for fault in FAULTS if not words or any(word in fault.name for word in words)]
    if not faults:
        print("no such fault; there are:", *(fault.name for fault in FAULTS), sep="\n  ",
              file=sys.stderr)
        return 2
    for fault in faults:
        print(f"  {fault.name} ...", file=sys.stderr, flush=True)
        line, problem = run(fault)
        lines.append(line)
        problems += [f"{fault.name}: {problem}"] * bool(problem)
    print(tables.table(HEADS, lines, width=160))
    print(f"\n  {time.monotonic() - begun:.0f} s in all", *problems, sep="\n")
    return int(bool(problems))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
