"""Two layers: the history follows from what was detected, whoever calculates what and when."""

import contextlib
import itertools
from datetime import UTC, datetime, timedelta
from pathlib import Path

import alarm_chaos
import pytest
from park import (
    DAY,
    MIDNIGHT,
    OneStep,
    add_samples,
    at,
    comment,
    define,
    every_ten_minutes,
    history,
    make_park,
    run_claimed,
    trigger,
)

import alarm_calc
import control
from worker import Worker, use_worker

pytest_plugins = ["alarm_fixtures"]


@pytest.mark.parametrize("order", [[111, 112], [112, 111]])
def test_priority_holds_in_either_order(conn, calculate, order):
    make_park(conn, alarms={111: (trigger(value=20), []), 112: (trigger(value=10), [111])})
    add_samples(conn, every_ten_minutes([15, 25, 15]))
    for number in order:
        assert calculate(alarms=[number]) == []
    assert history(conn) == [("LAN-01", 111, at(10), at(20)), ("LAN-01", 112, at(0), at(10)),
                             ("LAN-01", 112, at(20), at(30))]


def test_a_correction_of_the_important_alarm_settles_the_others(conn, calculate):
    make_park(conn, alarms={113: (trigger(value=5), [112]), 112: (trigger(value=10), [111]),
                            111: (trigger(value=20), [])})
    add_samples(conn, every_ten_minutes([25] * 3 + [15] * 3))
    calculate(alarms=[111, 112, 113])
    assert history(conn) == [  # where 111 hides 112, 113 stands
        ("LAN-01", 111, at(0), at(30)), ("LAN-01", 112, at(30), at(60)),
        ("LAN-01", 113, at(0), at(30))]
    conn.execute("UPDATE feature_values SET value = 40 - value")
    calculate(alarms=[111])
    assert history(conn) == [("LAN-01", 111, at(30), at(60)), ("LAN-01", 112, at(0), at(30)),
                             ("LAN-01", 113, at(30), at(60))]


def test_a_list_turned_round_is_followed_by_retry(conn, calculate):
    make_park(conn, alarms={111: (trigger(value=20), []), 112: (trigger(value=10), [111])})
    add_samples(conn, every_ten_minutes([15, 25, 15]))
    calculate(alarms=[111, 112])
    define(conn, 111, important=[112])
    define(conn, 112, important=[])
    control.retry_job(conn, 1, every_step=True)
    assert run_claimed() == []
    assert history(conn) == [("LAN-01", 112, at(0), at(30))]


def test_an_alarm_that_is_not_calculated_here_is_used_and_left_alone(conn, calculate):
    make_park(conn, alarms={111: (trigger(value=20), []), 112: ({"trigger_type": "event"}, [111]),
                            113: (trigger(value=10), [112])})
    add_samples(conn, every_ten_minutes([25] * 6))
    for low, high in [(-20, 100), (15, 20), (40, 50)]:  # of the manufacturer: they may overlap
        conn.execute("INSERT INTO alarms_history (object_id, alarm_id, start_time, end_time) "
                     "SELECT 1, id, %s, %s FROM alarms WHERE manufacturer_id = 112",
                     [at(low), at(high)])
    given = history(conn, 112)
    calculate(alarms=[111, 113])
    assert history(conn, 112) == given
    assert history(conn, 113) == []
    conn.execute("DELETE FROM alarms_history WHERE end_time = %s", [at(100)])
    calculate(at(18), at(45), alarms=[113])
    assert history(conn, 113) == [("LAN-01", 113, at(20), at(40))]


@pytest.mark.parametrize("numbers", ["{111,NULL}", "{{111,999},{NULL,998}}", "[5:6]={111,111}"])
def test_a_list_of_any_shape_is_the_numbers_in_it(conn, calculate, numbers):
    """What an int[] may hold, written by hand."""
    make_park(conn, alarms={112: (trigger(), []), 111: (trigger(value=20), [])})
    conn.execute("UPDATE alarms SET non_overlapping_alarms = %s WHERE manufacturer_id = 112",
                 [numbers])
    add_samples(conn, every_ten_minutes([15, 25]))
    assert calculate(alarms=[112, 111]) == []
    conn.execute("UPDATE feature_values SET value = 15")
    assert calculate(alarms=[111]) == []
    assert history(conn) == [("LAN-01", 112, at(0), at(20))]


def test_history_of_which_nothing_is_detected_is_settled_as_well(conn, calculate):
    """As after a trigger that was the manufacturer's has become a threshold."""
    make_park(conn, alarms={111: (trigger(value=20), []), 112: (trigger(), [111])})
    add_samples(conn, every_ten_minutes([25, 25]))
    conn.execute("INSERT INTO alarms_history (object_id, alarm_id, start_time, end_time) "
                 "SELECT 1, id, %s, %s FROM alarms WHERE manufacturer_id = 112", [at(-60), at(60)])
    calculate(alarms=[111])
    assert history(conn, 112) == [("LAN-01", 112, at(-60), at(0)), ("LAN-01", 112, at(20), at(60))]


@pytest.mark.parametrize("nights", [(0, 1), (1, 0)])
def test_a_period_over_midnight_comes_into_being_in_both_nights(conn, calculate, nights):
    make_park(conn, alarms={111: (trigger(min_duration=1800), [])})
    add_samples(conn, every_ten_minutes([11] * 4, at(-20)))
    for night in nights:
        calculate(MIDNIGHT + (night - 1) * DAY, MIDNIGHT + night * DAY)
        assert len(history(conn)) == (night == nights[1])
    assert history(conn) == [("LAN-01", 111, at(-20), at(20))]
    conn.execute("UPDATE feature_values SET value = 9 WHERE timestamp > %s", [MIDNIGHT])
    calculate(at(0), at(60))
    assert history(conn) == []


def test_late_stamps_are_bridged(conn, calculate):
    make_park(conn, alarms={111: (trigger(), []), 112: (trigger(max_gap=3), [])})
    add_samples(conn, {at(10 * n) + timedelta(seconds=n % 4): 11 for n in range(1, 145)})
    calculate(alarms=[111, 112], to=MIDNIGHT + 2 * DAY)
    assert len(history(conn, 111)) == 108
    assert history(conn, 112) == [("LAN-01", 112, at(0) + timedelta(seconds=1), at(1440))]


def test_joined_first_then_measured_then_giving_way(conn, calculate):
    """Two of 20 minutes with 10 between them are long enough; what is left may be short."""
    make_park(conn, alarms={111: (trigger(value=20), []),
                            112: (trigger(max_gap=600, min_duration=3000), [111])})
    add_samples(conn, every_ten_minutes([11, 25, 9, 11, 11, 9, 9, 11, 11]))
    calculate(alarms=[111, 112])
    assert history(conn, 112) == [("LAN-01", 112, at(0), at(10)), ("LAN-01", 112, at(20), at(50))]


@pytest.mark.parametrize(("low", "high"), [
    ("-infinity", "infinity"), ("2026-03-01 00:05Z", "infinity"),
    ("2026-03-01 00:05Z", "20000-01-01"), ("4000-01-01 BC", "2026-03-01 00:05Z")])
@pytest.mark.parametrize("shape", [{}, {"max_gap": 60, "min_duration": 60}])
def test_a_period_without_an_end_goes_on_behind_the_window(conn, calculate, shape, low, high):
    """As by hand while an alarm still stands; an upgrade takes it for detected, too."""
    make_park(conn, alarms={111: (trigger(value=20, **shape), []), 112: (trigger(**shape), [111])})
    add_samples(conn, every_ten_minutes([9, 15, 25, 15]))
    for table, number in itertools.product(["alarms_detected", "alarms_history"], [1, 2]):
        conn.execute(f"INSERT INTO {table} (object_id, alarm_id, start_time, end_time) "
                     "VALUES (1, %s, %s, %s)", [number, low, high])
    assert calculate(alarms=[111, 112]) == []
    conn.execute("DELETE FROM alarms_history WHERE start_time < '1000-01-01' "
                 "OR end_time > '9000-01-01'")
    assert history(conn) == [("LAN-01", 111, at(20), at(30)), ("LAN-01", 112, at(10), at(20)),
                             ("LAN-01", 112, at(30), at(40))]


def test_the_longest_lengths_are_read_by_every_postgresql(conn, calculate):
    make_park(conn, alarms={111: (trigger(max_gap=1e9, min_duration=1e9), [])})
    add_samples(conn, every_ten_minutes([15, 25, 15]))
    assert calculate() == []


@pytest.mark.parametrize(("zone", "interval", "stamp", "begin", "cut"), [
    ("UTC", "1 month", "2026-03-31 00:00Z", "2026-02-28 00:00Z", "2026-02-28 12:00Z"),
    ("UTC", "1 month", "2026-03-29 00:00Z", "2026-02-28 00:00Z", "2026-02-28 12:00Z"),
    ("Europe/Madrid", "1 day", "2026-03-29 22:00Z", "2026-03-28 23:00Z", "2026-03-29 21:59Z"),
    ("Europe/Madrid", "1 day", "2026-10-25 23:00Z", "2026-10-24 22:00Z", "2026-10-24 22:30Z"),
])
def test_months_and_days_are_the_same_under_any_cut(conn, ask, dsn, monkeypatch, zone, interval,
                                                    stamp, begin, cut):
    monkeypatch.setenv("PERFDB_TIMEZONE", zone)
    stamp, begin, cut = map(datetime.fromisoformat, (stamp, begin, cut))
    make_park(conn)
    conn.execute("UPDATE features SET sample_interval = %s::interval", [interval])
    add_samples(conn, {stamp: 11})
    with contextlib.closing(Worker(dsn)) as worker:
        use_worker(worker)
        for window in [(begin - DAY, cut), (cut, stamp + DAY)]:
            alarm_calc.JobAlarmCalc(ask(*window)).run()
        use_worker(None)
    assert history(conn) == [("LAN-01", 111, begin, stamp)]
    results = conn.execute("SELECT result FROM job_steps").fetchall()
    assert [row["result"]["samples"] for row in results] == [1, 1]


def test_a_sample_that_begins_at_the_end_does_not_count_before_one_that_reaches_in(conn,
                                                                                   calculate):
    """A month before 29 March is 28 February, and so is a month before 28 March."""
    make_park(conn)
    conn.execute("UPDATE features SET sample_interval = '1 month'")
    add_samples(conn, {datetime(2026, 3, 28, 9, tzinfo=UTC): 11,
                       datetime(2026, 3, 29, 8, tzinfo=UTC): 11})
    assert calculate(datetime(2026, 2, 27), datetime(2026, 2, 28, 9)) == []
    (step,) = conn.execute("SELECT result FROM job_steps").fetchall()
    assert step["result"] == {"periods": 1, "seconds": 3600, "samples": 1, "coverage": 0.030303}


def test_a_later_sample_may_stand_for_an_earlier_begin(conn, ask, dsn, monkeypatch):
    """02:30 comes before 02:10 in the night that has an hour twice; a day before it does not."""
    monkeypatch.setenv("PERFDB_TIMEZONE", "Europe/Madrid")
    make_park(conn)
    conn.execute("UPDATE features SET sample_interval = '1 day'")
    stamps = [datetime.fromisoformat(f"2026-10-25 {clock}Z") for clock in ("00:30", "01:10")]
    add_samples(conn, dict.fromkeys(stamps, 11))
    with contextlib.closing(Worker(dsn)) as worker:
        use_worker(worker)
        alarm_calc.JobAlarmCalc(ask(stamps[0] - 2 * DAY, stamps[1] + DAY)).run()
        use_worker(None)
    begin = datetime.fromisoformat("2026-10-24 00:10Z")
    assert history(conn) == [("LAN-01", 111, begin, stamps[1])]


# No data is not "no alarm".

@pytest.mark.parametrize("loss", [
    "DELETE FROM feature_values",
    "UPDATE feature_values SET value = NULL",
    "UPDATE feature_values SET value = 'NaN'",
])
def test_a_window_without_a_sample_erases_nothing(conn, calculate, loss):
    make_park(conn, alarms={111: (trigger(value=20), []), 112: (trigger(), [111])})
    add_samples(conn, every_ten_minutes([11, 25, 11]))
    calculate(alarms=[111, 112])
    before = history(conn)
    conn.execute(loss)
    assert len(calculate(alarms=[111, 112])) == 2
    assert "No sample of 'wind_speed' in the window has a value" in comment(conn, "job_steps")
    assert history(conn) == before
    assert calculate(alarms=[111, 112], objects=["LAN-02"]) == []  # nothing is known there
    assert calculate(at(60), at(120), alarms=[111, 112]) == []     # nor then

    assert calculate(alarms=[111], no_samples="clear") == []
    assert history(conn) == [("LAN-01", 112, at(0), at(30))]
    assert calculate(alarms=[112], no_samples="clear") == []
    assert history(conn) == []


def test_what_was_detected_and_hidden_is_not_erased_either(conn, calculate):
    make_park(conn, alarms={111: (trigger(value=5), []), 112: (trigger(), [111])})
    add_samples(conn, every_ten_minutes([11, 11]))
    calculate(alarms=[111, 112])
    assert history(conn, 112) == []
    conn.execute("DELETE FROM feature_values")
    assert len(calculate(alarms=[112])) == 1
    assert "alarm 112 is known to have stood there" in comment(conn, "job_steps")


def test_a_window_in_a_bridged_gap_erases_nothing(conn, calculate):
    """Nothing is detected in it, but the alarm stands."""
    make_park(conn, alarms={111: (trigger(max_gap=3600), [])})
    add_samples(conn, {at(10): 11, at(60): 11})
    calculate()
    assert history(conn) == [("LAN-01", 111, at(0), at(60))]
    assert len(calculate(at(20), at(40))) == 1
    assert calculate(at(20), at(40), no_samples="clear") == []
    assert history(conn) == [("LAN-01", 111, at(0), at(60))]


def test_the_upgrade_copies_the_history_once(conn):
    make_park(conn)
    conn.execute("DROP TABLE alarms_detected")
    conn.execute("INSERT INTO alarms_history (object_id, alarm_id, start_time, end_time) "
                 "VALUES (1, 1, %s, %s)", [at(0), at(30)])
    schema = (Path(__file__).parents[1] / "schema.sql").read_text()
    conn.execute(schema)
    rows = "SELECT * FROM alarms_detected"
    assert conn.execute(rows).fetchall() == [
        {"object_id": 1, "alarm_id": 1, "start_time": at(0), "end_time": at(30)}]
    conn.execute("DELETE FROM alarms_detected")
    conn.execute(schema)
    assert conn.execute(rows).fetchall() == []


def test_a_step_leaves_the_planner_as_it_was(conn, dsn):
    """The statement that ends the job is planned in the same transaction."""
    make_park(conn)
    with (contextlib.closing(Worker(dsn)) as worker, worker.connection.transaction()):
        OneStep(worker.lend(), 1, 1, start="2026-03-01 00:00:00", end="2026-03-02 00:00:00").run()
        for setting, value in (("enable_seqscan", "on"), ("plan_cache_mode", "auto")):
            assert worker.execute(f"SHOW {setting}", {}).fetchone() == (value,)


# Random cases against the oracle; make chaos runs thousands.

def test_random_cases_are_what_the_oracle_has(conn, dsn, monkeypatch):
    monkeypatch.setenv("PERFDB_TIMEZONE", alarm_chaos.ZONE)
    control.write_types(conn, ["Alarm Calculation"])
    with contextlib.closing(Worker(dsn)) as worker:
        use_worker(worker)
        problem = alarm_chaos.try_cases(worker.connection, 100, seed=1)
        use_worker(None)
    assert not problem


def test_random_cases_by_three_workers_are_what_the_oracle_has(conn, monkeypatch, run_handler):
    monkeypatch.setenv("PERFDB_TIMEZONE", alarm_chaos.ZONE)
    control.write_types(conn, ["Alarm Calculation"])
    runs = alarm_chaos.ask_at_once(conn, cases=15, seed=1)
    run_handler("--once", "--workers", "3")
    assert [run.difference() for run in runs] == [""] * 15
