"""Fixtures of the Bazefield tests: the stand-in, two turbines, jobs run in this process.

The stand-in behaves at random in all that the facts leave open. The seed is printed with a
failure; PERFDB_TEST_SEED=n repeats it. A test of one way in particular asks for `plain` and sets
it.
"""

import contextlib
import os
import random

import pytest
from fake_bazefield import FakeBazefield, Ways
from park import MIDNIGHT

import baze_insert_alloc
import baze_tag_delete
import bazefield
import control
import jobs
from worker import Worker, use_worker

LAN_01, LAN_02 = "1164AFE219C9D000", "1164AFE219C9D001"
T0 = bazefield.to_ms(MIDNIGHT)
MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000
START, END = "2026-03-01 00:00:00", "2026-03-02 00:00:00"
WANTED = (10, T0, T0 + DAY)
OUTSIDE = [T0 + n * 10 * MINUTE for n in [*range(-6, 0), *range(144, 151)]]  # at END it stays

# What an answer may be like that is none. Cured: the next try, or a look, brings it to an end.
CURED = ["cut before", "cut after", "408", "429", "503", "504", "short", "never", "late 408"]
FATAL = {"401": "status 401: Unauthorized: key *** has expired; check the API key",
         "403": "status 403: Forbidden: no write access",
         "500": "status 500: Error: SerializationException",
         "html": "status 200, but no JSON: Log in, ***",
         "deep": "nested too deep",
         "huge number": "status 200, but no JSON",
         "reply error": "status 200, but point is read only",
         "response status": "status 200, but Locked: range is archived",
         "redirect": "redirected to 'elsewhere.example', which is not followed"}


class Pauses(list):
    """The client's pauses, noted instead of slept; the stand-in's clock goes on by them."""

    scada: FakeBazefield | None = None

    def sleep(self, seconds):
        self.append(seconds)
        if self.scada:
            self.scada.advance(seconds)


@pytest.fixture
def pauses(monkeypatch):
    pauses = Pauses()
    bazefield.client_for.cache_clear()
    monkeypatch.setattr(bazefield.Client, "sleep", staticmethod(pauses.sleep))
    yield pauses
    bazefield.client_for.cache_clear()


@pytest.fixture
def scada(monkeypatch, pauses):
    seed = int(os.environ.get("PERFDB_TEST_SEED") or random.randrange(10**6))
    with FakeBazefield() as scada:
        scada.vary(seed)
        print(f"PERFDB_TEST_SEED={seed}: {scada.ways}")
        pauses.scada = scada
        monkeypatch.setenv("BAZEFIELD_URL", scada.url)
        monkeypatch.setenv("BAZEFIELD_API_KEY", "k3y-write")
        samples = {T0 + n * 10 * MINUTE: float(n) for n in range(-6, 151)}
        for object_id, name in ((LAN_01, "LAN-01"), (LAN_02, "LAN-02")):
            scada.add_object(object_id, name, {"ActivePower": dict(samples),
                                               "WindSpeed": dict(samples)})
        yield scada


@pytest.fixture
def plain(scada):
    """The stand-in as a client would hope for."""
    scada.ways = Ways()
    return scada


@pytest.fixture
def plant(conn, pauses):
    """Two turbines below a park; LAN-02 is looked up by name."""
    conn.execute("INSERT INTO object_types (name) VALUES ('wind_farm'), ('wind_turbine')")
    conn.execute("INSERT INTO object_models (object_type_id, name) VALUES "
                 "(1, 'park'), (2, 'G97'), (2, 'V90')")
    conn.execute("INSERT INTO objects (object_model_id, name, parent_id, bazefield_id) VALUES "
                 "(1, 'LAN', NULL, NULL), (2, 'LAN-01', 1, %s), (3, 'LAN-02', 1, NULL)", [LAN_01])
    control.write_types(conn, ["Bazefield Tag Delete", "Bazefield Insert Allocation"])


@pytest.fixture
def run(conn, dsn, plant):
    """Run a job in this process; return (job, its steps)."""
    worker = Worker(dsn)
    use_worker(worker)

    def run(cls, parameters):
        job_id = control.create_job(conn, cls._name, parameters)
        with contextlib.suppress(jobs.JobRequestError):
            cls(job_id).run()
        job = conn.execute("SELECT * FROM job_instances WHERE id = %s", [job_id]).fetchone()
        steps = conn.execute("SELECT * FROM job_steps WHERE job_instance_id = %s "
                             "ORDER BY position", [job_id])
        return job, steps.fetchall()
    yield run
    use_worker(None)
    worker.close()


@pytest.fixture
def delete(run):
    def delete(tags=("ActivePower",), objects=("LAN-01",), **more):
        return run(baze_tag_delete.JobBazeTagDelete, {
            "object_names": list(objects), "tags": list(tags), "start": START, "end": END} | more)
    return delete


@pytest.fixture
def insert(run):
    def insert(objects=("LAN-01",), **more):
        return run(baze_insert_alloc.JobBazeInsertAlloc, insert_parameters(objects) | more)
    return insert


def insert_parameters(objects=("LAN-01",)):
    return {"object_filter": {"selected": {"instances": list(objects)}}, "start": START,
            "end": END, "allocation_category": "Night", "allocation_type": "Internal"}


def times(scada, point="ActivePower", object_id=LAN_01):
    return sorted(scada.objects[object_id]["points"][point])
