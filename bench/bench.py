"""Measure the toolkit beside what an operator would use otherwise; see bench/README.md.

    make bench                  all parts
    make bench P="steps cold"   some: jobs steps create pickup claims alarms chains samples
                                cold memory scale

One PostgreSQL of its own, durable commits, everything interleaved in one run, medians of several
rounds. Printed are ratios, beside what they must be and aim at; raw figures go to bench/results/.
--full: `scale` with a million jobs (else 200,000), `samples` with ten million; mind the time.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "bench")]

import bench_alarms  # noqa: E402
import bench_jobs  # noqa: E402
import bench_samples  # noqa: E402
import others  # noqa: E402
from embedded_pg import Server  # noqa: E402
from measure import RAW, RESULTS, medians, report, seconds, verdict  # noqa: E402

import claims  # noqa: E402
import control  # noqa: E402
import handler  # noqa: E402
import jobctl  # noqa: E402
import jobs  # noqa: E402
import perfdb  # noqa: E402
import tables  # noqa: E402
from worker import Worker  # noqa: E402


class Bench(bench_alarms.Alarms):
    def __init__(self, server: Server, full: bool) -> None:
        self.server, self.full = server, full
        self.dsn = server.dsn()
        self.connection = perfdb.connect(self.dsn)
        self.connection.execute((ROOT / "schema.sql").read_text())
        self.connection.execute("CREATE TABLE one_row (id int PRIMARY KEY, n int)")
        self.connection.execute("INSERT INTO one_row VALUES (1, 0)")
        control.write_types(self.connection)

    def limit(self, count: int) -> float:
        """One prepared single-row UPDATE per round trip, each committed and waited for."""
        def work() -> None:
            for n in range(count):
                self.connection.execute("UPDATE one_row SET n = %s WHERE id = 1", [n],
                                        prepare=True)
        return seconds(work)

    def once(self, module: str = "bench_jobs") -> float:
        """Run everything due in this process, as handler.py --once does."""
        def work() -> None:
            status = handler.JobHandler(self.dsn, once=True).run()
            assert status == 0, status
        return seconds(work)

    # The parts.

    def jobs(self) -> None:
        """1-step no-op jobs per second, one worker, against the limit and the alternatives."""
        self.short_jobs(500)
        self.workers()

    def short_jobs(self, count: int, disk: str = "") -> None:
        self.install_others()

        def ours() -> float:
            control.create_jobs(self.connection, "Bench Noop", [{}] * count)
            return self.once()

        def procrastinate(concurrency: int) -> float:
            asyncio.run(others.procrastinate_create(self.dsn, count, True))
            return asyncio.run(others.procrastinate_drain(self.dsn, concurrency))

        def pgqueuer(kind: str, one_at_a_time: bool) -> float:
            asyncio.run(others.pgqueuer_create(self.dsn, count, True))
            return asyncio.run(others.pgqueuer_drain(self.dsn, kind, one_at_a_time))

        m = medians(limit=lambda: self.limit(count), ours=ours,
                    procrastinate_1=lambda: procrastinate(1),
                    procrastinate_10=lambda: procrastinate(10),
                    pgqueuer_one=lambda: pgqueuer("psycopg", True),
                    pgqueuer_batch=lambda: pgqueuer("psycopg", False),
                    pgqueuer_asyncpg=lambda: pgqueuer("asyncpg", False))
        report(f"1-step jobs{disk}, over the limit", m["limit"] / m["ours"], 0.5, 0.85)
        report("... over procrastinate's best",
               min(m["procrastinate_1"], m["procrastinate_10"]) / m["ours"], 2.5, 5)
        report("... over procrastinate, concurrency 1", m["procrastinate_1"] / m["ours"])
        report("... over pgqueuer one at a time", m["pgqueuer_one"] / m["ours"], 2, 4)
        report("... over pgqueuer's default batch, psycopg", m["pgqueuer_batch"] / m["ours"])
        report("... over pgqueuer's default batch, asyncpg", m["pgqueuer_asyncpg"] / m["ours"])

    def workers(self) -> None:
        """1-step jobs with 1, 2 and 4 worker processes: first begin to last end."""
        def drain(count: int) -> float:
            self.connection.execute("TRUNCATE job_instances, job_steps")
            control.create_jobs(self.connection, "Bench Noop", [{}] * 2000)
            self.command("handler.py", "--once", "--module", "bench_jobs", "--workers", str(count))
            return self.connection.execute(
                "SELECT extract(epoch FROM max(finished) - min(started))::float8 "
                "FROM job_instances").fetchone()[0]
        m = medians(3, workers_1=lambda: drain(1), workers_2=lambda: drain(2),
                    workers_4=lambda: drain(4))
        for n in (2, 4):
            report(f"1-step jobs, {n} workers over one", m["workers_1"] / m[f"workers_{n}"])

    def steps(self) -> None:
        """One job of 1,000 no-op steps: steps per second over the limit, commits that wait."""
        self.long_job(1000)

    def disk(self) -> None:
        """The same on a disk that needs a millisecond more for a durable commit (commit_delay)."""
        self.set_system("commit_delay = 1000", "commit_siblings = 0")
        for part in (self.long_job, self.short_jobs):
            part(200, ", slower disk")
        self.set_system("commit_delay = DEFAULT", "commit_siblings = DEFAULT")

    def set_system(self, *settings: str) -> None:
        for setting in settings:
            self.connection.execute(f"ALTER SYSTEM SET {setting}")
        self.connection.execute("SELECT pg_reload_conf(), pg_sleep(0.5)")

    def long_job(self, count: int, disk: str = "") -> None:
        syncs = []

        def ours() -> float:
            job_id = control.create_job(self.connection, "Bench Noop", {"steps": count})
            before = self.flushes()
            self.once()
            syncs.append((self.flushes() - before) / count)
            return self.connection.execute("SELECT extract(epoch FROM finished - started)::float8 "
                                           "FROM job_instances WHERE id = %s",
                                           [job_id]).fetchone()[0]
        m = medians(limit=lambda: self.limit(count), ours=ours)
        report(f"steps of a long job{disk}, over the limit", m["limit"] / m["ours"], 0.9, 1.0)
        report("commits that wait for the disk, per step", statistics.median(syncs), 1.05, 1.0,
               "<")

    def flushes(self) -> int:
        """WAL flushes by client sessions so far (PostgreSQL 18)."""
        time.sleep(1.1)  # statistics are written at most once a second
        self.connection.execute("SELECT pg_stat_force_next_flush()")
        return self.connection.execute("SELECT sum(fsyncs) FROM pg_stat_io WHERE object = 'wal' "
                                       "AND backend_type = 'client backend'").fetchone()[0]

    def create(self) -> None:
        """Creating jobs one by one and 10,000 at once."""
        self.install_others()
        for name, count, at_once in (("one by one", 300, False), ("10,000 at once", 10_000, True)):
            def ours(count: int = count, at_once: bool = at_once) -> float:
                if at_once:
                    return seconds(lambda: control.create_jobs(
                        self.connection, "Bench Noop", [{}] * count))
                return seconds(lambda: [control.create_job(self.connection, "Bench Noop", {})
                                        for _ in range(count)])
            m = medians(3, ours=ours,
                        procrastinate=lambda c=count, a=at_once: asyncio.run(
                            others.procrastinate_create(self.dsn, c, a)),
                        pgqueuer=lambda c=count, a=at_once: asyncio.run(
                            others.pgqueuer_create(self.dsn, c, a)))
            report(f"creating jobs {name}, over procrastinate", m["procrastinate"] / m["ours"])
            report(f"creating jobs {name}, over pgqueuer", m["pgqueuer"] / m["ours"])
        # Nobody ran them: no part after this one is to find them.
        self.connection.execute(
            "TRUNCATE job_instances, job_steps, procrastinate_jobs, pgqueuer CASCADE")

    @functools.cache  # noqa: B019  one Bench per run
    def install_others(self) -> None:
        """Make the tables of the alternatives, once."""
        asyncio.run(others.procrastinate_install(self.dsn))
        asyncio.run(others.pgqueuer_install(self.dsn))

    def pickup(self) -> None:
        """From the commit that creates a job to its step's begin, by an idle worker (p50, p95)."""
        self.install_others()
        found = {"ours": self.pick_up([str(ROOT / "handler.py"), "--module", "bench_jobs"],
                                      self.ask_ours)}
        for name in ("procrastinate", "pgqueuer"):
            found[name] = self.pick_up([str(ROOT / "bench" / "others.py"), name, self.dsn],
                                       lambda count, name=name: asyncio.run(
                                           self.ask_other(name, count)))
        RAW["pickup"] = found
        p95 = {name: statistics.quantiles(values, n=20)[-1] for name, values in found.items()}
        p50 = {name: statistics.median(values) for name, values in found.items()}
        print("    p50, p95 in ms:",
              {n: (round(1000 * p50[n], 2), round(1000 * p95[n], 2)) for n in found})
        report("pick-up p95, over procrastinate's", p95["ours"] / p95["procrastinate"], 0.7, 0.4,
               "<")
        report("pick-up p95, over pgqueuer's", p95["ours"] / p95["pgqueuer"], better="<")

    def pick_up(self, command: list[str], ask: Callable[[int], list[float]],
                count: int = 150) -> list[float]:
        process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True,
                                   env=self.env())
        time.sleep(3)  # until it is idle
        try:
            asked = ask(count)
            begun = [float(process.stdout.readline()) for _ in range(count)]
        finally:
            process.kill()
            process.wait()
        return [b - a for a, b in zip(asked, begun, strict=True)][10:]

    def ask_ours(self, count: int) -> list[float]:
        asked = []
        for _ in range(count):
            control.create_job(self.connection, "Bench Clock", {})
            asked.append(time.time())
            time.sleep(0.03)
        return asked

    async def ask_other(self, name: str, count: int) -> list[float]:
        ask, asked = await others.ask_clock(name, self.dsn), []
        for _ in range(count):
            await ask()
            asked.append(time.time())
            await asyncio.sleep(0.03)
        return asked

    def claims(self) -> None:
        """One claim behind 100,000 jobs, to be taken or not, and behind millions of ended ones."""
        self.behind_finished(10_000_000)
        self.behind_waiting(100_000)

    # Jobs that may not be taken: the type of each, and what else makes it so.
    NOT_TO_BE_TAKEN = {
        "future": [("Bench Noop", "run_after", "now() + interval '1 day'")],
        "future, five priorities": [
            ("Bench Noop", "run_after, priority", "now() + interval '1 day', n %% 5")],
        "paused": [("Bench Paused", "priority", "0")],
        "full": [("Bench Full", "priority", "0")],
        "of an unknown type": [("Bench Unknown", "priority", "0")],
        "test": [("Bench Noop", "description", "'latest'")],
    }
    NOT_TO_BE_TAKEN["mixed"] = [kind for kinds in NOT_TO_BE_TAKEN.values() for kind in kinds]

    def behind_waiting(self, many: int) -> None:
        self.connection.execute("TRUNCATE job_instances, job_steps")
        self.connection.execute(
            "INSERT INTO job_types (name, max_running) VALUES ('Bench Paused', 0), "
            "('Bench Full', 1), ('Bench Unknown', NULL) ON CONFLICT DO NOTHING")
        small = self.claim_time()
        for name, kinds in self.NOT_TO_BE_TAKEN.items():
            self.connection.execute("TRUNCATE job_instances, job_steps")
            self.fill_waiting("Bench Full", "worker_id", "4711", 1)  # nobody's, so no longer free
            for kind in kinds:
                self.fill_waiting(*kind, many // len(kinds))
            report(f"claim behind {many:,} jobs {name}, over an empty table",
                   self.claim_time() / small, 3.0, 1.0, "<")
        self.connection.execute("TRUNCATE job_instances, job_steps")
        self.fill_waiting("Bench Noop", "priority", "0", many)
        report(f"claim behind {many:,} waiting jobs, over an empty table",
               self.claim_time() / small, better="<")
        self.connection.execute("TRUNCATE job_instances, job_steps")

    def behind_finished(self, many: int) -> None:
        self.connection.execute("TRUNCATE job_instances, job_steps")
        small = self.claim_time()
        self.fill_waiting("Bench Noop", "state, started, finished", "'Finished', now(), now()",
                          many)
        report(f"claim behind {many:,} finished jobs, over an empty table",
               self.claim_time() / small, 1.2, 1.0, "<")

    def fill_waiting(self, type_name: str, columns: str, values: str, count: int) -> None:
        self.connection.execute(
            f"INSERT INTO job_instances (job_type_id, {columns}) "  # noqa: S608
            f"SELECT id, {values} FROM job_types, generate_series(1, %s) n WHERE name = %s",
            [count, type_name])

    def claim_time(self, count: int = 200) -> float:
        """Seconds per claim of one of `count` due jobs behind what is there; best of 3 medians."""
        worker = Worker(self.dsn)
        wanted = claims.Wanted.of(["Bench Noop", "Bench Full", "Bench Paused"])
        self.fill_waiting("Bench Noop", "priority", "-1", count)
        self.connection.execute("VACUUM ANALYZE job_instances")
        found = []
        for _ in range(3):
            found.append(statistics.median(
                seconds(lambda: claims.claim(worker, wanted)) for _ in range(count)))
            self.connection.execute(
                "UPDATE job_instances SET worker_id = NULL WHERE worker_id = %s", [worker.id])
            self.connection.execute("VACUUM job_instances")
        worker.close()
        RAW.setdefault("claims", []).append(found)
        return min(found)

    def scale(self) -> None:
        """jobctl list, show, stats behind many finished jobs of five steps, over a thousand."""
        many = 1_000_000 if self.full else 200_000
        type_id = self.connection.execute(
            "SELECT id FROM job_types WHERE name = 'Bench Noop'").fetchone()[0]

        def fill(count: int) -> None:
            self.connection.execute("TRUNCATE job_instances, job_steps")
            self.connection.execute(
                "INSERT INTO job_instances (job_type_id, state, created, started, finished) "
                "SELECT %s, 'Finished', t, t, t FROM generate_series(1, %s) n, "
                "LATERAL (SELECT now() - make_interval(mins => %s - n)) AS at(t)",
                [type_id, count, count])
            self.connection.execute(
                "INSERT INTO job_steps (job_instance_id, position, name, state, started, "
                "finished) SELECT id, p, 'step', 'Finished', now(), now() "
                "FROM job_instances, generate_series(1, 5) p")
            self.connection.execute("VACUUM ANALYZE job_instances, job_steps")

        commands = {"list": ["list"], "show": ["show"], "stats": ["stats"]}
        found: dict[str, dict[str, float]] = {}
        for size in (1000, many):
            fill(size)
            newest = self.connection.execute("SELECT max(id) FROM job_instances").fetchone()[0]
            commands["show"] = ["show", str(newest)]
            found[str(size)] = {name: statistics.median(
                seconds(lambda args=args: self.quiet(args)) for _ in range(9))
                for name, args in commands.items()}
        RAW["scale"] = found
        for name in commands:
            report(f"jobctl {name} behind {many:,} jobs, over 1,000",
                   found[str(many)][name] / found["1000"][name], 1.5, 1.0, "<")
        self.connection.execute("TRUNCATE job_instances, job_steps")

    def quiet(self, args: list[str]) -> None:
        with open(os.devnull, "w") as null:
            out, sys.stdout = sys.stdout, null
            try:
                assert jobctl.main([*args, "--dsn", self.dsn]) == 0
            finally:
                sys.stdout = out

    def cold(self) -> None:
        """An empty handler.py --once over a bare connect, and over procrastinate --one-shot."""
        self.connection.execute("TRUNCATE job_instances, job_steps, job_schedules")
        self.install_others()
        (ROOT / "bench" / "results").mkdir(exist_ok=True)
        app = ROOT / "bench" / "results" / "bench_app.py"
        app.write_text("import os, procrastinate\napp = procrastinate.App(connector="
                       "procrastinate.PsycopgConnector(conninfo=os.environ['PERFDB_DSN']))\n")
        m = medians(9, bare=lambda: self.command(
                           "-c", "import os, psycopg; psycopg.connect(os.environ['PERFDB_DSN'])"),
                    once=lambda: self.command("handler.py", "--once"),
                    one_shot=lambda: self.command("-m", "procrastinate", "--app=bench_app.app",
                                                  "worker", "--one-shot"))
        report("empty --once, over a bare connect", m["once"] / m["bare"], 2.0, 1.5, "<")
        report("empty --once, over procrastinate --one-shot", m["once"] / m["one_shot"],
               better="<")

    def memory(self) -> None:
        """Peak memory of a worker after 10,000 steps, over after 100."""
        small, large = self.peak_of_steps(100), self.peak_of_steps(10_000)
        report("worker memory after 10,000 steps, over after 100", large / small, 1.1, 1.0, "<")

    def peak_of_steps(self, steps: int) -> int:
        control.create_job(self.connection, "Bench Noop", {"steps": steps})
        return self.peak(f"{steps} steps")

    def peak(self, what: str) -> int:
        """Run everything due in a process of its own and return its peak memory in kB."""
        code = ("import re, handler, bench_jobs; handler.load_modules(handler.JOB_MODULES); "
                "handler.JobHandler(once=True).run(); "
                # not ru_maxrss, which begins with the size of the process that started this one
                "print(re.search(r'VmHWM:\\s*(\\d+)', open('/proc/self/status').read())[1])")
        peak = int(subprocess.run([sys.executable, "-c", code], env=self.env(), cwd=ROOT,
                                  check=True, capture_output=True, text=True).stdout)
        RAW.setdefault("memory_kB", {})[what] = peak
        return peak

    def env(self) -> dict[str, str]:
        return os.environ | {"PERFDB_DSN": self.dsn, "PYTHONPATH": os.pathsep.join(
            str(ROOT / d) for d in ("", "bench", "bench/results"))}

    def command(self, *args: str) -> float:
        """Run one of the project's commands; return seconds."""
        return seconds(lambda: subprocess.run(
            [sys.executable, *args], env=self.env(), cwd=ROOT, check=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))


    def samples(self) -> None:
        """A month of 100 objects from CSV files (--full: a year), over a bare COPY of the same."""
        times = 52_560 if self.full else 4_464
        for what, ratio in bench_samples.measure(self.connection, self.dsn, times):
            memory = "memory" in what
            report(what, ratio, 1.2 if memory else 0.5, 1.0, "<" if memory else ">")


PARTS = ["steps", "jobs", "disk", "create", "pickup", "cold", "memory", "alarms", "chains",
         "claims", "samples", "scale"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", help=f"which parts (default: all): {' '.join(PARTS)}")
    parser.add_argument("--full", action="store_true", help="a million jobs, ten million samples")
    args = parser.parse_args()
    if unknown := set(args.part) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {' '.join(PARTS)}")
    begun = time.monotonic()
    with Server({"shared_buffers": "1GB", "max_wal_size": "8GB", "jit": "off"}) as server:
        bench = Bench(server, args.full)
        RAW["machine"] = {"cpus": os.cpu_count(), "machine": platform.platform(),
                          "python": platform.python_version(),
                          "postgresql": bench.connection.info.parameter_status("server_version")}
        for part in args.part or PARTS:
            print(f"  {part}: {getattr(bench, part).__doc__.strip()}", flush=True)
            getattr(bench, part)()
    rows = [verdict(*row) for row in RESULTS]
    print(f"\n{tables.table(['what', 'ratio', 'must', 'aim', ''], rows, 200)}\n")
    print(f"  {RAW['machine']}\n  {time.monotonic() - begun:.0f} s")
    RAW["ratios"] = {what: ratio for what, ratio, *_ in RESULTS}
    RAW["peak_memory_kB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    file = ROOT / "bench" / "results" / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(RAW, indent=1, default=float))
    print(f"  raw figures: {file.relative_to(ROOT)}")
    return 0


assert bench_jobs.Noop._name in jobs.JOB_TYPES

if __name__ == "__main__":
    raise SystemExit(main())
