"""make chaos: break everything that can break while jobs run, and count what was lost.

For each fault a PostgreSQL of its own, two handlers with two workers each and some jobs of short
transactional steps; every step writes one row (its effect) in the transaction that marks it Finished.
Printed per fault: times injected, jobs lost (not ended as they should), effects doubled, late writes
refused (by workers that had been taken over meanwhile) and the longest time from a fault until its
job's next step was done. Ends with status 1 if a job was lost, an effect doubled, or a job took too
long to go on. Bounded: about a minute and a half.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import psycopg  # noqa: E402
import sample_jobs  # noqa: E402, F401
from embedded_pg import Server  # noqa: E402
from helpers import wait_for  # noqa: E402

import control  # noqa: E402
import perfdb  # noqa: E402
import tables  # noqa: E402

JOBS, STEPS, STEP_SECONDS = 8, 12, 0.1
LONGEST_SECONDS = 10.0  # until a job goes on; for most faults far less, see the table


class Chaos:
    """A server, its handlers, and what happened to the jobs."""

    def __init__(self, server: Server, directory: Path) -> None:
        self.server = server
        self.dsn = server.dsn()
        self.log = directory / "handlers.log"
        self.handlers: list[subprocess.Popen] = []
        self.injected, self.longest = 0, 0.0
        with perfdb.connect(self.dsn) as connection:
            connection.execute((ROOT / "schema.sql").read_text())
            connection.execute("CREATE TABLE trace (job_id bigint, step_id bigint)")
            control.write_types(connection, ["Transactional"])

    def rows(self, query: str, *params: Any) -> list[tuple]:
        """Ask the database, which may be away for a moment."""
        for _ in range(200):
            with suppress(psycopg.OperationalError), perfdb.connect(self.dsn) as connection:
                return connection.execute(query, params).fetchall()
            time.sleep(0.05)
        raise AssertionError("the server does not come back")

    def start(self, *args: str, dsn: str = "") -> subprocess.Popen:
        with self.log.open("ab") as log:
            self.handlers.append(subprocess.Popen(
                [sys.executable, str(ROOT / "handler.py"), "--module", "sample_jobs", *args], stdout=log, stderr=log,
                env=os.environ | {"PERFDB_DSN": dsn or self.dsn, "PYTHONPATH": str(ROOT / "tests")}))
        return self.handlers[-1]

    def ask(self, count: int = JOBS, what: str = "sleep") -> None:
        with perfdb.connect(self.dsn) as connection:
            control.create_jobs(connection, "Transactional", count * [
                {"steps": [what] * STEPS, "sleep": STEP_SECONDS}])

    def running(self) -> tuple[int, int, int, int]:
        """Return (job, worker, pid, backend_pid) of a job with a running step, chosen at random."""
        return wait_for(lambda: self.rows("""
            SELECT j.id, w.id, w.pid, w.backend_pid
              FROM job_instances j JOIN job_workers w ON w.id = j.worker_id
             WHERE EXISTS (SELECT FROM job_steps s WHERE s.job_instance_id = j.id AND s.state = 'Running')
             ORDER BY random() LIMIT 1"""), what="a running job")[0]

    def inject(self, fault: Callable[[], Any], job_id: int) -> None:
        """Do the damage and wait until the job's next step is done."""
        before = self.rows("SELECT count(*) FROM trace WHERE job_id = %s", job_id)[0][0]
        fault()
        begun = time.monotonic()
        wait_for(lambda: self.rows("SELECT count(*) > %s FROM trace WHERE job_id = %s", before, job_id)[0][0],
                 timeout=40, what=f"job {job_id} to go on")
        self.injected += 1
        self.longest = max(self.longest, time.monotonic() - begun)

    def finish(self) -> tuple[int, int]:
        """Wait until all jobs have ended; return (lost, doubled)."""
        query = "SELECT count(*) FROM job_instances WHERE state NOT IN ('Finished', 'Failed')"
        with suppress(AssertionError):
            wait_for(lambda: self.rows(query)[0][0] == 0, timeout=40)
        lost = self.rows(query)[0][0]
        doubled = self.rows("SELECT count(*) - count(DISTINCT step_id) FROM trace")[0][0]
        missing = self.rows("SELECT count(*) FROM job_steps s WHERE state = 'Finished' AND NOT EXISTS "
                            "(SELECT FROM trace t WHERE t.step_id = s.id)")[0][0]
        return lost + missing, doubled

    def stop(self) -> None:
        for handler in self.handlers:
            handler.kill()
            handler.wait()
        for (pid,) in self.rows("SELECT pid FROM job_workers"):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def refused(self) -> int:
        return self.log.read_text().count("dropped: ")


# The faults. Each gets handlers and jobs that are running, and does its damage a few times.


def kill_worker(chaos: Chaos) -> None:
    for _ in range(6):
        job_id, _, pid, _ = chaos.running()
        chaos.inject(lambda pid=pid: os.kill(pid, signal.SIGKILL), job_id)


def kill_handler(chaos: Chaos) -> None:
    for _ in range(3):
        job_id, *_ = chaos.running()

        def fault() -> None:
            victim = chaos.handlers.pop(0)
            victim.kill()
            victim.wait()
            chaos.start("--workers", "2")
        chaos.inject(fault, job_id)


def stop_worker(chaos: Chaos) -> None:
    for _ in range(3):
        job_id, _, pid, backend_pid = chaos.running()

        def fault(pid: int = pid, backend_pid: int = backend_pid) -> None:
            os.kill(pid, signal.SIGSTOP)
            chaos.rows("SELECT pg_terminate_backend(%s, 5000)", backend_pid)
        chaos.inject(fault, job_id)
        os.kill(pid, signal.SIGCONT)


def end_session(chaos: Chaos) -> None:
    for _ in range(6):
        job_id, *_, backend_pid = chaos.running()
        chaos.inject(lambda pid=backend_pid: chaos.rows("SELECT pg_terminate_backend(%s)", pid), job_id)


def take_over(chaos: Chaos) -> None:
    for _ in range(6):
        job_id, *_ = chaos.running()
        chaos.inject(lambda job_id=job_id: chaos.rows(
            "UPDATE job_instances SET worker_id = NULL WHERE id = %s RETURNING 1", job_id), job_id)


def restart_server(chaos: Chaos) -> None:
    for _ in range(3):
        job_id, *_ = chaos.running()
        chaos.inject(lambda: chaos.server.restart("immediate"), job_id)


def cut_half_open(chaos: Chaos) -> None:
    """A worker behind a proxy that goes deaf: the server sees it vanish, the worker sees nothing."""
    for _ in range(2):
        proxy = Proxy(chaos.server)
        chaos.ask()  # so that there is one left for the worker that is only starting
        behind = chaos.start(dsn=f"{proxy.dsn} tcp_user_timeout=2000")
        wait_for(lambda pid=behind.pid: chaos.rows(
            "SELECT 1 FROM job_instances j JOIN job_workers w ON w.id = j.worker_id WHERE w.pid = %s", pid),
            what="the worker behind the proxy to take a job")
        job_id = chaos.rows("SELECT j.id FROM job_instances j JOIN job_workers w ON w.id = j.worker_id "
                            "WHERE w.pid = %s", behind.pid)[0][0]
        chaos.inject(proxy.go_deaf, job_id)
        proxy.close()


def fill_disk(chaos: Chaos) -> None:
    chaos.ask(2, "disk full")
    chaos.injected += 2 * STEPS


def start_twenty(chaos: Chaos) -> None:
    for _ in range(20):
        chaos.start("--once")
    chaos.injected += 20


def hold_snapshot(chaos: Chaos) -> None:
    connection = psycopg.connect(chaos.dsn)
    connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
    connection.execute("SELECT count(*) FROM job_steps")  # and is never ended
    chaos.connection = connection
    chaos.injected += 1


class Proxy:
    """TCP on loopback in front of the server's socket; can stop forwarding without closing."""

    def __init__(self, server: Server) -> None:
        info = psycopg.conninfo.conninfo_to_dict(server.dsn())
        self.path = f"{info['host']}/.s.PGSQL.{info['port']}"
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.dsn = psycopg.conninfo.make_conninfo(
            server.dsn(), host="127.0.0.1", port=self.listener.getsockname()[1])
        self.near: list[socket.socket] = []
        self.far: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, far = self.listener.accept()[0], socket.socket(socket.AF_UNIX)
                far.connect(self.path)
                self.near.append(near)
                self.far.append(far)
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._forward, args=ends, daemon=True).start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(65536):
                sink.sendall(data)

    def go_deaf(self) -> None:
        for far in self.far:
            with suppress(OSError):
                far.shutdown(socket.SHUT_RDWR)  # the server sees its client vanish; nothing reaches the worker

    def close(self) -> None:
        self.listener.close()
        for end in self.near + self.far:
            end.close()


FAULTS = {
    "worker killed (SIGKILL)": kill_worker,
    "handler killed (SIGKILL)": kill_handler,
    "worker stopped, taken over, woken": stop_worker,
    "session ended (pg_terminate_backend)": end_session,
    "job taken away by hand": take_over,
    "PostgreSQL restarted (immediate)": restart_server,
    "connection cut half open": cut_half_open,
    "disk full in a step": fill_disk,
    "20 handlers in one second": start_twenty,
    "old snapshot held open": hold_snapshot,
}


def run(fault: Callable[[Chaos], None]) -> list[Any]:
    """Run one fault on a server of its own; return its line of the table."""
    with tempfile.TemporaryDirectory(prefix="perfdb-chaos-") as directory, Server({"fsync": "off"}) as server:
        chaos = Chaos(server, Path(directory))
        try:
            chaos.ask()
            for _ in range(2):
                chaos.start("--workers", "2")
            problem = ""
            try:
                fault(chaos)
            except AssertionError as exc:
                problem = str(exc)
            lost, doubled = chaos.finish()
            return [chaos.injected, lost + bool(problem), doubled, chaos.refused(), round(chaos.longest, 2), problem]
        finally:
            chaos.stop()


def main() -> int:
    begun, lines = time.monotonic(), []
    for name, fault in FAULTS.items():
        print(f"  {name} ...", file=sys.stderr, flush=True)
        lines.append([name, *run(fault)])
    print(tables.table(["fault", "injected", "jobs lost", "effects doubled", "late writes refused",
                        "going on after (s)", "problem"], lines))
    print(f"\n  {time.monotonic() - begun:.0f} s in all")
    return int(any(lost or doubled or longest > LONGEST_SECONDS for _, _, lost, doubled, _, longest, _ in lines))


if __name__ == "__main__":
    raise SystemExit(main())
