"""How long the pages take, and how large they are, behind a little and behind a lot.

    .venv/bin/python bench/pages.py [--jobs 1000000] [--samples 10000000]

Two databases on one PostgreSQL, the same park and the same last days in both: one with a thousand
jobs and samples, one with as many as asked for. Each command is run in turn as cron would run it.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import psycopg  # noqa: E402
from embedded_pg import Server  # noqa: E402

ROUNDS = 7
TURBINES = 100
WINDOW_DAYS = 31

FILL_SQL = """
INSERT INTO object_types (name) VALUES ('wind_turbine');
INSERT INTO object_models (object_type_id, name) SELECT id, 'G97' FROM object_types;
INSERT INTO features (object_model_id, name, unit)
SELECT id, n, 'm/s' FROM object_models, unnest('{wind_speed,active_power}'::text[]) n;
INSERT INTO objects (object_model_id, name)
SELECT id, 'LAN-' || n FROM object_models, generate_series(1, %(turbines)s) n;
INSERT INTO alarms (object_model_id, manufacturer_id, name, trigger)
SELECT id, n, 'alarm ' || n, '{"trigger_type": "threshold", "threshold_type": "high",
                               "feature_name": "wind_speed", "threshold_value": 20}'
  FROM object_models, generate_series(111, 112) n;
INSERT INTO feature_values
SELECT o, f, date_trunc('hour', now()) - n * interval '10 min', n %% 30
  FROM generate_series(0, %(samples)s / (2 * %(turbines)s) - 1) n,
       generate_series(1, %(turbines)s) o, generate_series(1, 2) f;
INSERT INTO alarms_history (object_id, alarm_id, start_time, end_time)
SELECT o.id, a.id, date_trunc('day', now()) - n * interval '2 d',
       date_trunc('day', now()) - n * interval '2 d' + interval '1 h'
  FROM objects o, alarms a, generate_series(1, GREATEST(1, %(samples)s / 10000 / 6)) n;
INSERT INTO job_schedules (job_type_id, description, every, first_start, next_start)
SELECT id, 'nightly ' || n, interval '1 day', date_trunc('day', now()) - interval '400 days',
       date_trunc('day', now())
  FROM job_types, generate_series(1, 10) n WHERE name = 'Alarm Calculation';
INSERT INTO job_instances (job_type_id, state, description, comment, schedule_id, window_start,
                           created, run_after, started, finished)
SELECT t.id, CASE WHEN n %% 100 = 0 THEN 'Failed' ELSE 'Finished' END, 'job ' || n,
       CASE WHEN n %% 100 = 0 THEN '1 (50.00%%) steps failed' END,
       1 + n %% 10,
       CASE WHEN n < 3000 THEN date_trunc('day', now()) - (1 + n / 10) * interval '1 day' END,
       at, at, at, at + interval '2 s'
  FROM job_types t, generate_series(0, %(jobs)s - 1) n,
       LATERAL (SELECT now() - (%(jobs)s - n) * %(every)s::interval) AS a(at)
 WHERE t.name = 'Alarm Calculation';
INSERT INTO job_steps (job_instance_id, position, name, state, object_id, comment, started,
                       finished)
SELECT j.id, k, 'LAN-' || k, CASE WHEN k = 2 THEN j.state ELSE 'Finished' END, k,
       CASE WHEN k = 2 AND j.state = 'Failed' THEN 'no wind' END, j.started, j.finished
  FROM job_instances j, generate_series(1, 2) k
"""


def fill(dsn: str, jobs: int, samples: int, every: str) -> None:
    """Make the tables and put jobs into them, one each `every`."""
    subprocess.run([sys.executable, ROOT / "jobctl.py", "init", "--dsn", dsn], check=True)
    with psycopg.connect(dsn, autocommit=True, cursor_factory=psycopg.ClientCursor) as conn:
        conn.execute(FILL_SQL, {"jobs": jobs, "samples": samples, "every": every,
                                "turbines": TURBINES})
        conn.execute("VACUUM ANALYZE")


def seconds(dsn: str, *command: str) -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, *command], check=False, cwd=ROOT, stdout=subprocess.DEVNULL,
                   env=os.environ | {"PERFDB_DSN": dsn})
    return time.perf_counter() - begun


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--samples", type=int, default=10_000_000)
    args = parser.parse_args()
    with Server({"max_wal_size": "4GB"}) as server, tempfile.TemporaryDirectory() as directory:
        for name, jobs, samples, every in (("little", 1000, 1000, "80 s"),
                                           ("much", args.jobs, args.samples, "8 s")):
            with psycopg.connect(server.dsn(), autocommit=True) as admin:
                admin.execute(f"CREATE DATABASE {name}")
            fill(server.dsn(name), jobs, samples, every)
        days = [time.strftime("%F 00:00:00", time.gmtime(time.time() - 86400 * n))
                for n in (WINDOW_DAYS, 0)]
        out = f"{directory}/page.html"
        commands = {
            "report jobs": ["report.py", "jobs", "--out", out],
            "report alarms": ["report.py", "alarms", "--from", days[0], "--to", days[1],
                              "--out", out],
            "doctor": ["jobctl.py", "doctor"], "list": ["jobctl.py", "list"],
            "stats --prometheus": ["jobctl.py", "stats", "--prometheus", f"{directory}/x.prom"]}
        print(f"{'':20} {'little':>9} {'much':>9} {'ratio':>6} {'size':>8}")
        for what, command in commands.items():
            times = {"little": [], "much": []}
            for _ in range(ROUNDS):
                for name, found in times.items():
                    found.append(seconds(server.dsn(name), *command))
            little, much = (statistics.median(found) for found in times.values())
            size = f"{os.path.getsize(out) / 1000:.0f} kB" if "report" in what else ""
            print(f"{what:20} {1000 * little:6.0f} ms {1000 * much:6.0f} ms "
                  f"{much / little:6.2f} {size:>8}", flush=True)


if __name__ == "__main__":
    main()
