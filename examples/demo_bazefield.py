"""Both Bazefield jobs, end to end, against a stand-in server on this machine.

Starts a PostgreSQL and a stand-in Bazefield of its own, asks for a dry run, a delete and an insert
of allocations, runs `handler.py --once`, and prints what the server held before and after. Nothing
is left behind.
"""

from __future__ import annotations

import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from embedded_pg import Server  # noqa: E402
from fake_bazefield import FakeBazefield  # noqa: E402

import bazefield  # noqa: E402
import control  # noqa: E402
import handler  # noqa: E402
import perfdb  # noqa: E402
import tables  # noqa: E402

MARCH = bazefield.to_ms(datetime(2026, 3, 1, tzinfo=UTC))
TEN_MINUTES = 600_000
IDS = {"LAN-01": "1164AFE219C9D000", "LAN-02": "1164AFE219C9D001"}

PARK_SQL = """
INSERT INTO object_types (name) VALUES ('wind_farm'), ('wind_turbine');
INSERT INTO object_models (object_type_id, name) VALUES (1, 'park'), (2, 'G97');
INSERT INTO objects (object_model_id, name, parent_id)
VALUES (1, 'LAN', NULL), (2, 'LAN-01', 1), (2, 'LAN-02', 1);
"""

DELETE = {"object_names": ["LAN-01"], "tags": ["ActivePower"],
          "start": "2026-03-01 00:00:00", "end": "2026-03-02 00:00:00"}
INSERT = {"object_filter": {"selected": {"parent": ["LAN"]}}, "allocation_type": "Internal",
          "allocation_category": "Night", "child_category": "Grid",
          "start": "2026-03-01 00:00:00", "end": "2026-03-01 06:00:00"}


def holds(scada: FakeBazefield) -> str:
    """Return a table of what the stand-in holds."""
    rows = [(name, point, len(values), *map(bazefield.from_ms, (min(values), max(values))))
            for name, i in IDS.items() for point, values in scada.objects[i]["points"].items()]
    names = {i: name for name, i in IDS.items()}
    allocations = [(a["id"], names[a["objectId"]], a["category"]["name"],
                    *map(bazefield.from_ms, (a["start"], a["end"])))
                   for a in scada.allocations.values()]
    return "\n\n".join([
        tables.table(["object", "point", "samples", "first", "last"], rows),
        tables.table(["allocation", "object", "category", "start", "end"], allocations)]) + "\n"


def run(*command: str) -> int:
    print("$ python", *command, flush=True)
    command = (sys.executable, str(ROOT / command[0]), *command[1:])
    return subprocess.run(command, check=False).returncode


def main() -> int:
    if os.environ.get("PERFDB_DSN"):
        print("PERFDB_DSN is set; this demo brings its own server: "
              "env -u PERFDB_DSN make demo-bazefield", file=sys.stderr)
        return 2
    handler.load_modules(handler.JOB_MODULES)
    with Server() as server, FakeBazefield() as scada:
        for name, object_id in IDS.items():
            samples = {MARCH + n * TEN_MINUTES: float(n) for n in range(3 * 144)}
            scada.add_object(object_id, name, {"ActivePower": dict(samples),
                                               "WindSpeed": dict(samples)})
        os.environ |= {"PERFDB_DSN": server.dsn(), "BAZEFIELD_URL": scada.url,
                       "BAZEFIELD_API_KEY": "k3y-write"}
        run("jobctl.py", "init")
        with perfdb.connect() as connection:
            connection.execute(PARK_SQL)
            for name, parameters, text in (
                    ("Bazefield Tag Delete", DELETE | {"dry_run": True}, "look first"),
                    ("Bazefield Tag Delete", DELETE, "then delete"),
                    ("Bazefield Insert Allocation", INSERT, "nights of LAN")):
                control.create_job(connection, name, parameters, text)
        print("\n  What Bazefield holds before\n\n" + holds(scada))
        status = run("handler.py", "--once")
        for job_id in "123":
            run("jobctl.py", "show", job_id)
        print("\n  What Bazefield holds after\n\n" + holds(scada))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
