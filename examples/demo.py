"""The main job, end to end, on a park made up for the purpose.

Starts a PostgreSQL of its own in a temporary directory and goes the way of README's "Your park in
five minutes": tables, four turbines from examples/park.toml, a month of ten-minute samples from a
CSV file, an Alarm Calculation, `handler.py --once` as cron would run it. Prints the job, its steps
and the alarms it found. Nothing is left behind.

With PERFDB_DSN set it refuses, as it would write its samples there; --into-my-database does it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from embedded_pg import Server  # noqa: E402

import control  # noqa: E402
import perfdb  # noqa: E402
import tables  # noqa: E402

PARK = "examples/park.toml"
PARAMETERS = {"object_names": ["LAN-01", "LAN-02", "LAN-03", "LAN-04"], "alarm_ids": [111, 112],
              "start": "2026-03-01 00:00:00+01:00", "end": "2026-04-01 00:00:00+02:00"}

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
    with tempfile.TemporaryDirectory() as directory:
        file = str(Path(directory) / "LAN-March.csv")
        status = (run("jobctl.py", "init") or run("plant.py", "apply", PARK)
                  or run("examples/make_samples.py", file, "--from", "2026-03-01", "--days", "31")
                  or run("samples.py", "load", file, "--layout", PARK))
    return status or calculate(dsn)


def calculate(dsn: str) -> int:
    """Ask for the alarms of March, have them calculated, print job and alarms."""
    with perfdb.connect(dsn) as connection:
        job_id = control.create_job(connection, "Alarm Calculation", PARAMETERS,
                                    "Alarms of LAN in March")
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
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--into-my-database", action="store_true",
                        help="use the empty database of PERFDB_DSN, and leave the park there")
    args = parser.parse_args()
    dsn = os.environ.get("PERFDB_DSN")
    if args.into_my_database and dsn:
        return demo(dsn)
    if dsn:
        print("PERFDB_DSN is set, and the demo would write sample data into that database.\n"
              "Unset it (env -u PERFDB_DSN make demo) to use a temporary server, or, for an empty "
              "database of your own:\n  python examples/demo.py --into-my-database",
              file=sys.stderr)
        return 2
    with Server() as server:
        return demo(server.dsn())


if __name__ == "__main__":
    raise SystemExit(main())
