"""The main job, end to end, on a park made up for the purpose.

Starts a PostgreSQL of its own in a temporary directory, makes the tables, four turbines and a month
of ten-minute samples, asks for an Alarm Calculation, runs `handler.py --once` as cron would, and
prints the job, its steps and the alarms it found. Nothing is left behind.

With PERFDB_DSN set it refuses, because it would write its samples there; --into-my-database does it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from embedded_pg import Server  # noqa: E402

import control  # noqa: E402
import perfdb  # noqa: E402
import tables  # noqa: E402

PARK_SQL = """
INSERT INTO object_types (name) VALUES ('wind_farm'), ('wind_turbine');
INSERT INTO object_models (object_type_id, name)
SELECT id, CASE name WHEN 'wind_farm' THEN 'park' ELSE 'G97' END FROM object_types;
INSERT INTO objects (object_model_id, name) SELECT id, 'LAN' FROM object_models WHERE name = 'park';
INSERT INTO objects (object_model_id, name, parent_id)
SELECT m.id, 'LAN-0' || n, park.id
  FROM object_models m, objects park, generate_series(1, 4) AS n
 WHERE m.name = 'G97' AND park.name = 'LAN';
INSERT INTO features (object_model_id, name, unit)
SELECT id, f.name, f.unit
  FROM object_models, (VALUES ('wind_speed', 'm/s'), ('active_power', 'kW')) AS f(name, unit)
 WHERE object_models.name = 'G97';
INSERT INTO alarms (object_model_id, manufacturer_id, name, trigger, non_overlapping_alarms)
SELECT m.id, a.number, a.name,
       jsonb_build_object('trigger_type', 'threshold', 'threshold_type', a.kind,
                          'feature_name', a.feature, 'threshold_value', a.value),
       a.important
  FROM object_models m,
       (VALUES (111, 'storm',      'high', 'wind_speed',   19::float8, '{}'::int[]),
               (112, 'low output', 'low',  'active_power', 40,         '{111}')
       ) AS a(number, name, kind, feature, value, important)
 WHERE m.name = 'G97';
"""

# Weather made of three slow waves and some noise, the same in every run; the power follows the wind
# between 3 and 25 m/s, and in a storm the turbine stands still. A few samples are missing.
SAMPLES_SQL = """
SELECT setseed(0.5);
WITH wind AS (
    SELECT o.id AS object_id, ts,
           GREATEST(0, 9 + 5 * sin(t / 90000 + o.id / 9.0) + 4 * sin(t / 31000) + 3 * sin(t / 11000 + o.id)
                       + random()) AS speed
      FROM objects o,
           generate_series('2026-03-01 00:10+00'::timestamptz, '2026-04-01 00:00+00', '10 min') AS ts,
           LATERAL (SELECT extract(epoch FROM ts)::float8) AS seconds(t)
     WHERE o.parent_id IS NOT NULL
)
INSERT INTO feature_values (object_id, feature_id, timestamp, value)
SELECT object_id, f.id, ts,
       CASE WHEN f.name = 'wind_speed'        THEN speed
            WHEN speed > 19 OR speed < 3      THEN 0
            ELSE LEAST(2000, 4 * (speed - 3) ^ 3) END
  FROM wind, features f
 WHERE random() > 0.002;
VACUUM ANALYZE feature_values
"""

PARAMETERS = {"object_names": ["LAN-01", "LAN-02", "LAN-03", "LAN-04"], "alarm_ids": [111, 112],
              "start": "2026-03-01 00:00:00", "end": "2026-04-01 00:00:00"}

ALARMS_SQL = """
SELECT o.name                                                 AS object,
       a.manufacturer_id                                      AS alarm,
       a.name                                                 AS name,
       count(*)                                               AS periods,
       round(sum(extract(epoch FROM h.end_time - h.start_time)) / 3600, 1) AS hours,
       to_char(min(h.start_time), 'DD Mon HH24:MI')           AS first,
       to_char(max(h.end_time), 'DD Mon HH24:MI')             AS last
  FROM alarms_history h
  JOIN objects o ON o.id = h.object_id
  JOIN alarms a  ON a.id = h.alarm_id
 GROUP BY o.name, a.manufacturer_id, a.name
 ORDER BY o.name, a.manufacturer_id
"""


def demo(dsn: str) -> int:
    """Make the park in the empty database `dsn`, run the job, print what came of it."""
    os.environ["PERFDB_DSN"] = dsn
    run("jobctl.py", "init")
    with perfdb.connect(dsn) as connection:
        for statement in (PARK_SQL + SAMPLES_SQL).split(";\n"):
            connection.execute(statement)
        samples = connection.execute("SELECT count(*) FROM feature_values").fetchone()[0]
        print(f"\n  A park of 4 turbines with {samples:,} ten-minute samples of March 2026.\n")
        job_id = control.create_job(connection, "Alarm Calculation", PARAMETERS, "Alarms of LAN in March")
        started = time.monotonic()
        status = run("handler.py", "--once")
        print(f"  {time.monotonic() - started:.1f} s, exit status {status}\n")
        run("jobctl.py", "show", str(job_id))
        print("\n  The alarms it found\n")
        cursor = connection.execute(ALARMS_SQL)
        print(tables.table([column.name for column in cursor.description], cursor.fetchall()))
    print("\n  Two pages to look at\n")
    (ROOT / ".venv" / "demo").mkdir(parents=True, exist_ok=True)
    run("report.py", "jobs", "--out", ".venv/demo/jobs.html")
    run("report.py", "alarms", "--from", PARAMETERS["start"], "--to", PARAMETERS["end"],
        "--out", ".venv/demo/alarms.html")
    return status


def run(*command: str) -> int:
    """Run one of the project's commands as a user would and return its exit status."""
    print("$ python", shlex.join(command), flush=True)
    return subprocess.run([sys.executable, *command], cwd=ROOT, check=False).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into-my-database", action="store_true",
                        help="make the park in the empty database of PERFDB_DSN instead, and leave it there")
    args = parser.parse_args()
    dsn = os.environ.get("PERFDB_DSN")
    if args.into_my_database and dsn:
        return demo(dsn)
    if dsn:
        print("PERFDB_DSN is set, and the demo would write sample data into that database.\n"
              "Unset it (env -u PERFDB_DSN make demo) to use a temporary server, or, for an empty database of "
              "your own:\n  python examples/demo.py --into-my-database", file=sys.stderr)
        return 2
    with Server() as server:
        return demo(server.dsn())


if __name__ == "__main__":
    raise SystemExit(main())
