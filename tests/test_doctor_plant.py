"""What doctor says of alarms, and that the statements it prints mend it."""

from datetime import timedelta

import pytest
from park import MIDNIGHT, add_samples, make_park, trigger

import doctor_plant

GOOD = {111: (trigger(), []), 112: (trigger(), [111]), 113: ({"trigger_type": "event"}, [])}


def findings(conn):
    return [finding for check in doctor_plant.CHECKS for finding in check(conn)]


def mend(conn, finding):
    """Run the statement a finding ends with."""
    start = max(finding.find("UPDATE "), finding.find("DELETE "))
    conn.execute(finding[start:].split(", then ")[0])


def samples_every(minutes, count=20):
    return {MIDNIGHT + n * timedelta(minutes=minutes): 1.0 for n in range(count)}


def test_nothing_is_said_of_what_is_well(conn):
    make_park(conn, alarms=GOOD)
    add_samples(conn, samples_every(10))
    late = {MIDNIGHT + timedelta(minutes=10 * n, seconds=n % 4): 1.0 for n in range(99)}
    add_samples(conn, late, "LAN-02")
    conn.execute("INSERT INTO alarms_detected VALUES (1, 1, now() - interval '1 h', now())")
    assert findings(conn) == []


@pytest.mark.parametrize(("rule", "problem"), [
    ([], "$: [] is not of type 'object'"),
    (trigger() | {"hysteresis": 2}, "'hysteresis' was unexpected"),
    (trigger(feature="wind"), "the model has no feature 'wind'; it has active_power, wind_speed"),
    ({"threshold_type": "high"}, "'trigger_type' is a required property"),
])
def test_triggers_that_cannot_be_used(conn, rule, problem):
    make_park(conn, alarms=GOOD | {114: (rule, [])})
    (finding,) = findings(conn)
    assert finding.startswith("alarms: the trigger of alarm 114 of model 'G97' cannot be used: ")
    assert problem in finding
    assert finding.endswith("mend the column trigger of alarms, row 4")


def test_numbers_that_no_alarm_has(conn):
    make_park(conn, alarms=GOOD | {114: (trigger(), [7, 111, 8])})
    (finding,) = findings(conn)
    assert "alarm 114 of model 'G97' gives way to 7, 8, which its model does not have" in finding
    mend(conn, finding)
    assert findings(conn) == []
    lists = "SELECT non_overlapping_alarms AS a FROM alarms WHERE manufacturer_id = 114"
    assert conn.execute(lists).fetchone() == {"a": [111]}


def test_samples_at_infinity_have_no_interval(conn):
    """PostgreSQL subtracts them from 17 on only."""
    make_park(conn)
    add_samples(conn, samples_every(10))
    conn.execute("INSERT INTO feature_values VALUES (1, 1, 'infinity', 1), (1, 1, '-infinity', 1)")
    assert findings(conn) == []


def test_a_list_of_any_shape_is_the_numbers_in_it(conn):
    make_park(conn, alarms=GOOD | {114: (trigger(), [])})
    conn.execute("UPDATE alarms SET non_overlapping_alarms = '{{111,7},{8,NULL}}' WHERE id = 4")
    (finding,) = findings(conn)
    assert "alarm 114 of model 'G97' gives way to 7, 8, NULL, which its model does" in finding
    mend(conn, finding)
    assert findings(conn) == []


def test_a_circle(conn):
    make_park(conn, alarms={111: (trigger(), [112]), 112: (trigger(), [111])})
    (finding,) = findings(conn)
    assert finding.startswith("alarms: model 'G97': ")
    assert "goes round in a circle" in finding


@pytest.mark.parametrize("table", ["alarms_history", "alarms_detected"])
@pytest.mark.parametrize("change", [
    "DELETE FROM alarms",
    "UPDATE alarms SET id = 99",
    "DELETE FROM objects WHERE id = 2",
    "UPDATE objects SET object_model_id = 2 WHERE id = 2",
])
def test_rows_that_no_alarm_owns(conn, table, change):
    make_park(conn)
    conn.execute("INSERT INTO object_models (id, object_type_id, name) VALUES (2, 1, 'V90')")
    conn.execute(f"INSERT INTO {table} (object_id, alarm_id, start_time, end_time) "
                 "SELECT 2, 1, t, t + interval '1 s' "
                 "FROM generate_series(now(), now() + interval '9 h', '1 h') AS t")
    assert findings(conn) == []
    conn.execute(change)
    (finding,) = findings(conn)
    assert finding.startswith(f"{table}: rows by id of object 2 alarm 1: the object's model has ")
    mend(conn, finding)
    assert findings(conn) == []
    assert conn.execute(f"SELECT count(*) AS n FROM {table}").fetchone() == {"n": 0}


@pytest.mark.parametrize(("interval", "minutes", "found"), [
    ("10 min", 15, "00:15:00"), ("1 hour", 10, "00:10:00"), ("1 month", 1440, "1 day")])
def test_samples_that_come_otherwise_than_the_feature_says(conn, interval, minutes, found):
    make_park(conn)
    conn.execute("UPDATE features SET sample_interval = %s::interval WHERE id = 1", [interval])
    add_samples(conn, samples_every(minutes), "LAN-02")
    (finding,) = findings(conn)
    assert f"samples of 'wind_speed' of model 'G97' come every {found}, " in finding
    mend(conn, finding)
    assert findings(conn) == []


def test_months_are_as_long_as_they_are(conn):
    make_park(conn)
    conn.execute("UPDATE features SET sample_interval = '1 month'")
    add_samples(conn, {MIDNIGHT.replace(month=n): 1.0 for n in range(1, 13)})
    assert findings(conn) == []


def test_too_few_samples_say_nothing(conn):
    make_park(conn)
    add_samples(conn, samples_every(15, count=5))
    assert findings(conn) == []
