"""Loading CSV files with samples.py, over a bare COPY of the same samples into the same table."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

import psycopg

ROOT = Path(__file__).resolve().parents[1]
START = datetime(2025, 1, 1)
LOAD = """
import re, sys, samples
assert samples.main(sys.argv[1:]) == 0
print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])
"""
COPY_SQL = "COPY feature_values (object_id, feature_id, timestamp, value) FROM STDIN"

PARK_SQL = """
TRUNCATE feature_values, alarms, features, objects, object_models, object_types;
INSERT INTO object_types (id, name) VALUES (1, 'wind_turbine');
INSERT INTO object_models (id, object_type_id, name) VALUES (1, 1, 'bench');
INSERT INTO features (id, object_model_id, name)
VALUES (1, 1, 'wind_speed'), (2, 1, 'active_power');
INSERT INTO objects (id, object_model_id, name)
SELECT n, 1, 'T' || lpad(n::text, 3, '0') FROM generate_series(1, 100) AS n
"""


def write_files(directory: Path, times: int) -> tuple[Path, Path, Path]:
    """Write the samples of 100 objects in time order, as a wide and a long file and for COPY."""
    paths = tuple(directory / name for name in ("wide.csv", "long.csv", "copy.txt"))
    source = random.Random(1)
    with contextlib.ExitStack() as stack:
        wide, long, copy = (stack.enter_context(path.open("w")) for path in paths)
        wide.write("time;object;wind_speed;active_power\n")
        long.write("time,object,signal,value\n")
        for n in range(1, times + 1):
            at = (START + n * timedelta(minutes=10)).isoformat(" ", "minutes")
            rows = [(o, round(source.uniform(0, 25), 3), round(source.uniform(0, 2000), 2))
                    for o in range(1, 101)]
            wide.writelines(f"{at};T{o:03};{speed};{power}\n" for o, speed, power in rows)
            long.writelines(f"{at},T{o:03},wind_speed,{speed}\n{at},T{o:03},active_power,{power}\n"
                            for o, speed, power in rows)
            copy.writelines(f"{o}\t1\t{at}+00\t{speed}\n{o}\t2\t{at}+00\t{power}\n"
                            for o, speed, power in rows)
    return paths


def bare_copy(connection: psycopg.Connection, path: Path) -> float:
    """Return the seconds of a COPY into the empty table."""
    empty(connection)
    begun = time.perf_counter()
    with path.open("rb") as file, connection.cursor().copy(COPY_SQL) as target:
        for block in iter(lambda: file.read(1 << 17), b""):
            target.write(block)
    return time.perf_counter() - begun


def empty(connection: psycopg.Connection) -> None:
    connection.execute("TRUNCATE feature_values")
    connection.execute("CHECKPOINT")


def load(dsn: str, path: Path, *more: str) -> tuple[float, int]:
    """Load a file by a process of its own; return its seconds and its peak memory in kB."""
    command = [sys.executable, "-c", LOAD, "load", str(path), "--zone", "UTC", "--stamps", "end",
               "--dsn", dsn, *more]
    begun = time.perf_counter()
    told = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return time.perf_counter() - begun, int(told.rsplit(maxsplit=1)[-1])


def measure(connection: psycopg.Connection, dsn: str, times: int) -> Iterator[tuple[str, float]]:
    """Yield (what, ratio) for 200 samples at each of `times`."""
    connection.execute(PARK_SQL)
    with tempfile.TemporaryDirectory() as directory:
        small, *_ = write_files(Path(directory), times // 10)
        empty(connection)
        _, little = load(dsn, small)
        wide, long, copy = write_files(Path(directory), times)
        bare = bare_copy(connection, copy)
        empty(connection)
        seconds, much = load(dsn, wide)
        yield "a wide file, speed over a bare COPY", bare / seconds
        yield "... memory over that of a tenth of the samples", much / little
        yield "... the same file again", bare / load(dsn, wide)[0]
        empty(connection)
        yield "a long file, speed over a bare COPY", bare / load(dsn, long, "--feature-column",
                                                                "signal")[0]
    connection.execute(PARK_SQL.split(";")[0])  # nothing is left to the other parts
