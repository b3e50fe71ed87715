"""A small park for tests, and the alarm calculation once more in plain Python, to compare with."""

import math
from datetime import UTC, datetime, timedelta

from helpers import claim

import alarm_calc
import jobs
from worker import current_worker

TEN_MINUTES = timedelta(minutes=10)
DAY = timedelta(days=1)
MIDNIGHT = datetime(2026, 3, 1, tzinfo=UTC)


def at(minutes):
    return MIDNIGHT + timedelta(minutes=minutes)


def trigger(kind="high", feature="wind_speed", value=10.0, **shape):
    return {"trigger_type": "threshold", "threshold_type": kind, "feature_name": feature,
            "threshold_value": value} | shape


def make_park(conn, objects=("LAN-01", "LAN-02"), alarms=None):
    """Make a park of one model with the features wind_speed and active_power.

    `alarms`: manufacturer id -> (trigger, list of more important alarms).
    """
    conn.execute("INSERT INTO object_types (id, name) VALUES (1, 'wind_turbine')")
    conn.execute("INSERT INTO object_models (id, object_type_id, name) VALUES (1, 1, 'G97')")
    conn.execute("INSERT INTO features (id, object_model_id, name, unit) VALUES "
                 "(1, 1, 'wind_speed', 'm/s'), (2, 1, 'active_power', 'kW')")
    for name in objects:
        conn.execute("INSERT INTO objects (object_model_id, name) VALUES (1, %s)", [name])
    for number, (rule, important) in (alarms or {111: (trigger(), [])}).items():
        add_alarm(conn, number, rule, important)


def add_alarm(conn, number, rule, important=()):
    conn.execute("INSERT INTO alarms (object_model_id, manufacturer_id, trigger, "
                 "non_overlapping_alarms) VALUES (1, %s, %s, %s)",
                 [number, jobs.Jsonb(rule), list(important)])


def define(conn, number, trigger=None, important=None):
    """Change an alarm's definition."""
    conn.execute("UPDATE alarms SET trigger = COALESCE(%s, trigger), "
                 "non_overlapping_alarms = COALESCE(%s, non_overlapping_alarms) "
                 "WHERE manufacturer_id = %s",
                 [trigger and jobs.Jsonb(trigger), important, number])


def run_claimed():
    """Run the job that is next in this process; return the steps that failed."""
    job = claim(current_worker(), "Alarm Calculation")
    return jobs.take_up(current_worker(), job).run()


def comment(conn, table="job_instances"):
    """Return the comment of the first that failed."""
    return conn.execute(f"SELECT comment FROM {table} WHERE state = 'Failed' ORDER BY id"
                        ).fetchone()["comment"]


class OneStep(alarm_calc.JobAlarmCalc):
    """A step without a job, to look at what it does in its transaction or how long it takes."""

    connection = step = parameters = None

    def __init__(self, connection, object_id, alarm_id, **parameters):
        self.connection, self.parameters = connection, parameters
        self.step = {"object_id": object_id, "alarm_id": alarm_id}

    def run(self):
        with self.connection.transaction():
            return self._run_step(0)


def add_samples(conn, samples, object_name="LAN-01", feature_id=1):
    """Store {timestamp: value}; values may be None or NaN."""
    with conn.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO feature_values SELECT id, %s, %s, %s FROM objects WHERE name = %s",
            [(feature_id, at, value, object_name) for at, value in samples.items()])


def every_ten_minutes(values, start=MIDNIGHT):
    """Return {timestamp: value}: the first sample stands for the ten minutes from `start`."""
    return {start + (n + 1) * TEN_MINUTES: value for n, value in enumerate(values)}


def history(conn, number=None):
    """Return [(object, alarm, start, end)] of the table, sorted."""
    rows = conn.execute("""
        SELECT o.name, a.manufacturer_id AS number, h.start_time, h.end_time
          FROM alarms_history h
          JOIN objects o ON o.id = h.object_id
          JOIN alarms a ON a.id = h.alarm_id
         ORDER BY 1, 2, 3""").fetchall()
    return [tuple(r.values()) for r in rows if number is None or r["number"] == number]


def periods(samples, fires, start, end):
    """Return when the samples' intervals fire in [start, end), joined where they touch."""
    found = []
    for at, value in sorted(samples.items()):
        if value is None or math.isnan(value) or not fires(value):
            continue
        low, high = max(at - TEN_MINUTES, start), min(at, end)
        if low >= high:
            continue
        if found and found[-1][1] >= low:
            found[-1] = (found[-1][0], max(found[-1][1], high))
        else:
            found.append((low, high))
    return found


def without(found, covered):
    """Return `found` with the periods `covered` taken out."""
    for low, high in covered:
        found = [piece for start, end in found
                 for piece in ((start, min(end, low)), (max(start, high), end))
                 if piece[0] < piece[1]]
    return found
