"""What does the Bazefield client add to a request, and how many requests does a step make?

    python bench/bazefield_overhead.py

Against the stand-in of the tests, interleaved in one run: the same read through the client and through
a bare http.client connection; then a tag delete of 20 objects x 5 tags, requests counted.
"""

from __future__ import annotations

import http.client
import json
import os
import statistics
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from embedded_pg import Server  # noqa: E402
from fake_bazefield import FakeBazefield  # noqa: E402

import baze_tag_delete  # noqa: E402
import bazefield  # noqa: E402
import control  # noqa: E402
import perfdb  # noqa: E402
from worker import current_worker  # noqa: E402

START = datetime(2026, 3, 1, tzinfo=UTC)
END = datetime(2026, 3, 2, tzinfo=UTC)
FIRST = bazefield.to_ms(START)


def overhead(scada: FakeBazefield) -> tuple[float, float]:
    """Return the medians, in ms, of a read through the client and of the bare request."""
    client, bare = bazefield.client(), http.client.HTTPConnection("localhost", scada.server_port)
    body = json.dumps({"objectIds": ["1164AFE219C90000"], "points": ["P0"], "from": str(FIRST),
                       "to": str(bazefield.to_ms(END)), "take": bazefield.PAGE})
    ours, theirs = [], []
    for _ in range(400):
        begun = time.perf_counter()
        bare.request("POST", "/BazeField.Services/api/objects/timeseries?format=json", body,
                     {"Authorization": "Bearer k3y-write"})
        bare.getresponse().read()
        theirs.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        sum(1 for _ in client.sample_times("1164AFE219C90000", "P0", START, END))
        ours.append(time.perf_counter() - begun)
    return 1000 * statistics.median(ours), 1000 * statistics.median(theirs)


def requests_per_step(scada: FakeBazefield) -> dict[str, float]:
    """Run a delete of 20 objects x 5 tags and return requests per step, by operation."""
    with Server({"fsync": "off"}) as server:
        os.environ["PERFDB_DSN"] = server.dsn()
        with perfdb.connect() as connection:
            connection.execute((ROOT / "schema.sql").read_text())
            control.write_types(connection)
            connection.execute("INSERT INTO object_types (name) VALUES ('wind_turbine')")
            connection.execute("INSERT INTO object_models (object_type_id, name) VALUES (1, 'G97')")
            connection.execute("INSERT INTO objects (object_model_id, name) SELECT 1, 'T' || n "
                               "FROM generate_series(0, 19) n")
            job_id = control.create_job(connection, "Bazefield Tag Delete", {
                "object_names": [f"T{n}" for n in range(20)], "tags": [f"P{n}" for n in range(5)],
                "start": "2026-03-01 00:00:00Z", "end": "2026-03-02 00:00:00Z"})
        scada.log.clear()
        baze_tag_delete.JobBazeTagDelete(job_id).run()
        current_worker().close()
    names = [name for name, _ in scada.log]
    return {name: names.count(name) / 100 for name in sorted(set(names))}


def main() -> int:
    with FakeBazefield() as scada:
        os.environ |= {"BAZEFIELD_URL": scada.url, "BAZEFIELD_API_KEY": "k3y-write"}
        for n in range(20):
            scada.add_object(f"1164AFE219C9{n:04X}", f"T{n}", {
                f"P{p}": {FIRST + k * 600_000: 1.0 for k in range(144)} for p in range(5)})
        ours, bare = overhead(scada)
        print(f"  a read of 144 samples: {ours:.2f} ms through the client, {bare:.2f} ms bare, "
              f"{ours - bare:.2f} ms more (must: below 2)")
        counts = requests_per_step(scada)
        print(f"  requests per step: {counts}, {sum(counts.values()):.2f} in all (must: 4 plus lookups)")
    return int(ours - bare >= 2 or sum(counts.values()) > 4.1)


if __name__ == "__main__":
    raise SystemExit(main())
