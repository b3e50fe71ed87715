"""Fixtures of the tests of alarms: ask for an Alarm Calculation, and run it in this process."""

import pytest
from park import DAY, MIDNIGHT

import alarm_calc
import control
from worker import Worker, use_worker


@pytest.fixture
def ask(conn):
    """Ask for an Alarm Calculation; return the job's id."""
    control.write_types(conn, ["Alarm Calculation"])

    def ask(from_=MIDNIGHT, to=MIDNIGHT + DAY, objects=("LAN-01",), alarms=(111,), **more):
        return control.create_job(conn, "Alarm Calculation", {
            "object_names": list(objects), "alarm_ids": list(alarms),
            "start": f"{from_:%Y-%m-%d %H:%M:%S}Z", "end": f"{to:%Y-%m-%d %H:%M:%S}Z"} | more)
    return ask


@pytest.fixture
def calculate(ask, dsn):
    """Ask for a calculation and run it in this process; return the steps that failed."""
    worker = Worker(dsn)
    use_worker(worker)
    yield lambda *args, **kwargs: alarm_calc.JobAlarmCalc(ask(*args, **kwargs)).run()
    use_worker(None)
    worker.close()
