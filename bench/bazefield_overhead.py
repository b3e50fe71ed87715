"""What does the Bazefield client cost: time per request, requests per step, memory per answer?

    python bench/bazefield_overhead.py

Against the stand-in of the tests, interleaved in one run: the same read through the client and
through a bare http.client connection; a tag delete of 20 objects x 5 tags and an insert of 20
allocations, requests counted; a read of 60 MB in a process of its own, its peak against that of
one that reads next to nothing.
"""

from __future__ import annotations

import http.client
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from embedded_pg import Server  # noqa: E402
from fake_bazefield import FakeBazefield  # noqa: E402

import baze_insert_alloc  # noqa: E402
import baze_tag_delete  # noqa: E402
import bazefield  # noqa: E402
import control  # noqa: E402
import perfdb  # noqa: E402
from worker import current_worker  # noqa: E402

START, END = datetime(2026, 3, 1, tzinfo=UTC), datetime(2026, 3, 2, tzinfo=UTC)
FIRST, LAST = bazefield.to_ms(START), bazefield.to_ms(END)
WINDOW = {"start": "2026-03-01 00:00:00Z", "end": "2026-03-02 00:00:00Z"}
OBJECT = "1164AFE219C90000"
BIG_BYTES = 60_000_000

PARK_SQL = """
INSERT INTO object_types (name) VALUES ('wind_turbine');
INSERT INTO object_models (object_type_id, name) VALUES (1, 'G97');
INSERT INTO objects (object_model_id, name) SELECT 1, 'T' || n FROM generate_series(0, 19) n;
"""


def overhead(scada: FakeBazefield) -> tuple[float, float]:
    """Return the medians, in ms, of a read through the client and of the bare request."""
    client = bazefield.client()
    bare = http.client.HTTPConnection("localhost", scada.server_port)
    body = json.dumps({"objectIds": [OBJECT], "points": ["P0"], "from": str(FIRST - 1),
                       "to": str(LAST), "take": bazefield.PAGE})
    ours, theirs = [], []
    for _ in range(400):
        begun = time.perf_counter()
        bare.request("POST", "/BazeField.Services/api/objects/timeseries?format=json", body,
                     {"Authorization": "Bearer k3y-write"})
        bare.getresponse().read()
        theirs.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        next(client.sample_times(OBJECT, "P0", START, END))  # one request; the next only confirms
        ours.append(time.perf_counter() - begun)
    return 1000 * statistics.median(ours), 1000 * statistics.median(theirs)


def requests(scada: FakeBazefield) -> tuple[Counter, Counter]:
    """Run a delete of 20 objects x 5 tags and an insert for 20 objects; count requests by name."""
    with Server({"fsync": "off"}) as server:
        os.environ["PERFDB_DSN"] = server.dsn()
        with perfdb.connect() as connection:
            connection.execute((ROOT / "schema.sql").read_text())
            control.write_types(connection)
            connection.execute(PARK_SQL)
            delete_id = control.create_job(connection, "Bazefield Tag Delete", WINDOW | {
                "object_names": [f"T{n}" for n in range(20)], "tags": [f"P{n}" for n in range(5)]})
            insert_id = control.create_job(connection, "Bazefield Insert Allocation", WINDOW | {
                "object_filter": {"selected": {"types": ["wind_turbine"]}},
                "allocation_type": "Internal", "allocation_category": "Night"})
        counts = []
        for job in (lambda: baze_tag_delete.JobBazeTagDelete(delete_id),
                    lambda: baze_insert_alloc.JobBazeInsertAlloc(insert_id)):
            scada.log.clear()
            assert job().run() == []
            counts.append(Counter(name for name, _ in scada.log))
        current_worker().close()
    return counts[0], counts[1]


READ = """
import resource, sys
sys.path[:0] = [{root!r}]
import bazefield
from datetime import datetime
times = bazefield.client().sample_times({object!r}, {point!r}, datetime.fromisoformat({start!r}),
                                        datetime.fromisoformat({end!r}))
found = sum(1 for _ in times)
print(found, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def memory(scada: FakeBazefield) -> tuple[int, float]:
    """Return samples found and MB more for an answer of 60 MB than for one of 10 kB."""
    row = json.dumps({"t": FIRST, "q": 192, "v": 1.25, "t_local": "2026-03-01T01:00:00+01:00"})
    count = BIG_BYTES // (len(row) + 2)
    samples = ", ".join(row.replace(str(FIRST), str(FIRST + n)) for n in range(count))
    answer = json.dumps({"objects": {OBJECT: {"points": {"BIG": [{"timeSeries": ["SAMPLES"]}]}}}})
    answer = answer.replace('"SAMPLES"', samples)
    small = scada.do_read
    scada.do_read = lambda r: (small(r) if r["points"] != ["BIG"] else answer
                               if int(r["from"]) < FIRST else {"objects": {}})
    peaks = {}
    for point in ("P0", "BIG"):
        code = READ.format(root=str(ROOT), object=OBJECT, point=point, start=START.isoformat(),
                           end=END.isoformat())
        # Started by a shell: a child's first peak is the size of the parent it was forked from.
        shown = subprocess.run(["/bin/sh", "-c", '"$0" -c "$1"', sys.executable, code], check=True,
                               capture_output=True, text=True).stdout.split()
        peaks[point] = int(shown[0]), float(shown[1])
    assert len(answer) > 0.95 * BIG_BYTES
    return peaks["BIG"][0], peaks["BIG"][1] - peaks["P0"][1]


def main() -> int:
    with FakeBazefield() as scada:
        os.environ |= {"BAZEFIELD_URL": scada.url, "BAZEFIELD_API_KEY": "k3y-write"}
        for n in range(20):
            scada.add_object(f"1164AFE219C9{n:04X}", f"T{n}", {
                f"P{p}": {FIRST + k * 600_000: 1.0 for k in range(144)} for p in range(5)})
        ours, bare = overhead(scada)
        print(f"  a read of 144 samples: {ours:.2f} ms through the client, {bare:.2f} ms bare, "
              f"{ours - bare:.2f} ms more (must: below 2)")
        deletes, inserts = requests(scada)
        print(f"  100 steps of a delete: {deletes.total()} requests, {dict(deletes)}\n"
              "    (must: 4 a step and lookups: count, confirm, delete, read back)")
        print(f"  20 steps of an insert: {inserts.total()} requests, {dict(inserts)}\n"
              "    (must: 3 a step and lookups: look, insert, look)")
        found, more = memory(scada)
        print(f"  an answer of 60 MB, {found} samples: {more:.0f} MB (must: below 200)")
    return int(ours - bare >= 2 or deletes.total() > 410 or inserts.total() > 70 or more >= 200)


if __name__ == "__main__":
    raise SystemExit(main())
