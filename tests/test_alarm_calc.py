"""Alarm Calculation against the same calculation in plain Python."""

import csv
import itertools
import math
import random
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from helpers import claim, flush_statistics, wait_for
from park import (
    MIDNIGHT,
    add_alarm,
    add_samples,
    every_ten_minutes,
    history,
    make_park,
    periods,
    trigger,
    without,
)

import alarm_calc
import control
import jobs
import perfdb
from worker import Worker, current_worker, use_worker

NAN = math.nan
DAY = timedelta(days=1)
REAL_YEAR = Path(__file__).parents[2] / "shared" / "data" / "yalova_2018_10min.csv"


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


def comment(conn, table="job_instances"):
    return conn.execute(f"SELECT comment FROM {table} WHERE state = 'Failed' ORDER BY id").fetchone()["comment"]


def at(minutes):
    return MIDNIGHT + timedelta(minutes=minutes)


def test_a_plan_made_on_an_empty_history_does_not_read_it_whole_later(conn, dsn, ask):
    """A plan is kept and used for the other objects, when the history has grown by the periods of the first."""
    names = [f"LAN-{n}" for n in range(30)]
    make_park(conn, objects=names)
    for name in names:
        add_samples(conn, every_ten_minutes([11, 9] * 20), name)
    conn.execute("VACUUM alarms_history")  # now PostgreSQL knows that it is empty
    job_id = ask(objects=names)
    worker = Worker(dsn)
    use_worker(worker)
    alarm_calc.JobAlarmCalc(job_id).run()
    flush_statistics(worker.connection)
    (read,) = conn.execute("SELECT t.seq_tup_read + sum(i.idx_tup_read) FROM pg_stat_user_tables t "
                           "JOIN pg_stat_user_indexes i USING (relid) WHERE t.relname = 'alarms_history' "
                           "GROUP BY t.seq_tup_read").fetchone().values()
    assert len(history(conn)) == 30 * 20
    assert read < 30  # each object's own periods, of which there were none
    use_worker(None)
    worker.close()


@pytest.mark.parametrize(("rule", "values", "expected"), [
    pytest.param(trigger("high", value=10), [9, 11, 12, 9], [(10, 30)], id="high"),
    pytest.param(trigger("low", value=10), [9, 11, 8, 9], [(0, 10), (20, 40)], id="low"),
    pytest.param(trigger("high", value=10), [10, 10.000001], [(10, 20)], id="high is strict"),
    pytest.param(trigger("low", value=10), [10, 9.999999], [(10, 20)], id="low is strict"),
    pytest.param(trigger("high", value=10), [11, NAN, 11, None, 11], [(0, 10), (20, 30), (40, 50)],
                 id="NaN and NULL do not trigger high"),
    pytest.param(trigger("low", value=10), [9, NAN, 9, None, 9], [(0, 10), (20, 30), (40, 50)],
                 id="NaN and NULL do not trigger low"),
    pytest.param(trigger("high", value=10), [math.inf, -math.inf], [(0, 10)], id="infinite values are values"),
    pytest.param(trigger("high", value=-1), [], [], id="no samples"),
])
def test_threshold(conn, calculate, rule, values, expected):
    make_park(conn, alarms={111: (rule, [])})
    add_samples(conn, every_ten_minutes(values))
    assert calculate() == []
    assert history(conn) == [("LAN-01", 111, at(low), at(high)) for low, high in expected]


def test_a_missing_sample_ends_an_alarm(conn, calculate):
    make_park(conn)
    add_samples(conn, {at(10): 11, at(20): 11, at(40): 11})
    calculate()
    assert history(conn) == [("LAN-01", 111, at(0), at(20)), ("LAN-01", 111, at(30), at(40))]


def test_the_sample_interval_is_the_features(conn, calculate):
    make_park(conn)
    conn.execute("UPDATE features SET sample_interval = '1 hour'")
    add_samples(conn, {at(60): 11, at(120): 11})
    calculate()
    assert history(conn) == [("LAN-01", 111, at(0), at(120))]


def test_samples_that_straddle_an_edge_count_for_the_part_inside(conn, calculate):
    make_park(conn)
    add_samples(conn, every_ten_minutes([11] * 6))
    calculate(at(5), at(27))
    assert history(conn) == [("LAN-01", 111, at(5), at(27))]


def test_only_the_history_inside_the_window_is_replaced(conn, calculate):
    make_park(conn, alarms={111: (trigger(), []), 112: (trigger(), [])})
    add_samples(conn, every_ten_minutes([9, 9, 9, 11, 9, 9]))
    for number, low, high in [(111, -50, 5), (111, 15, 20), (111, 25, 70), (111, 90, 95), (112, 10, 30)]:
        conn.execute("INSERT INTO alarms_history (object_id, alarm_id, start_time, end_time) "
                     "SELECT 1, id, %s, %s FROM alarms WHERE manufacturer_id = %s", [at(low), at(high), number])
    calculate(at(0), at(50))
    assert history(conn, 111) == [("LAN-01", 111, at(low), at(high))
                                  for low, high in [(-50, 0), (30, 40), (50, 70), (90, 95)]]
    assert history(conn, 112) == [("LAN-01", 112, at(10), at(30))]


def test_periods_that_touch_at_the_edge_are_one_row(conn, calculate):
    make_park(conn)
    add_samples(conn, every_ten_minutes([9, 11, 11, 11, 11, 9]))
    calculate(at(0), at(30))
    calculate(at(30), at(60))
    assert history(conn) == [("LAN-01", 111, at(10), at(50))]


def test_computing_again_touches_no_row(conn, calculate):
    make_park(conn)
    add_samples(conn, every_ten_minutes([11, 9] * 20))
    calculate()
    before = conn.execute("SELECT xmin::text, * FROM alarms_history ORDER BY id").fetchall()
    calculate()
    assert conn.execute("SELECT xmin::text, * FROM alarms_history ORDER BY id").fetchall() == before


def test_more_important_alarms_win(conn, calculate):
    make_park(conn, alarms={113: (trigger(value=5), [112, 111]), 112: (trigger(value=8), [111]),
                            111: (trigger(value=11), [])})
    add_samples(conn, every_ten_minutes([6, 9, 12, 9, 6]))
    calculate(alarms=[113, 111, 112])
    assert history(conn) == [
        ("LAN-01", 111, at(20), at(30)),
        ("LAN-01", 112, at(10), at(20)), ("LAN-01", 112, at(30), at(40)),
        ("LAN-01", 113, at(0), at(10)), ("LAN-01", 113, at(40), at(50))]


def test_an_important_alarm_that_is_not_asked_for_counts_as_history_has_it(conn, calculate):
    make_park(conn, alarms={111: (trigger(), []), 112: (trigger(), [111, 999])})
    add_samples(conn, every_ten_minutes([11] * 6))
    conn.execute("INSERT INTO alarms_history (object_id, alarm_id, start_time, end_time) "
                 "SELECT 1, id, %s, %s FROM alarms WHERE manufacturer_id = 111", [at(20), at(35)])
    calculate(alarms=[112])
    assert history(conn, 112) == [("LAN-01", 112, at(0), at(20)), ("LAN-01", 112, at(35), at(60))]


def test_the_steps_are_named_and_say_what_they_found(conn, calculate):
    make_park(conn)
    add_samples(conn, every_ten_minutes([9, 11, 11]))
    calculate(objects=["LAN-02", "LAN-01"])
    steps = conn.execute("SELECT name, object_id, alarm_id, feature_id, result FROM job_steps "
                         "ORDER BY position").fetchall()
    assert [tuple(s.values()) for s in steps] == [
        ("LAN-02 / alarm 111", 2, 1, 1, {"periods": 0, "seconds": 0}),
        ("LAN-01 / alarm 111", 1, 1, 1, {"periods": 1, "seconds": 1200})]


# Requests that cannot be calculated.

def test_all_unknown_objects_and_alarms_are_named_before_any_step(conn, calculate):
    make_park(conn)
    with pytest.raises(jobs.JobRequestError):
        calculate(objects=["LAN-77", "LAN-01", "LAN-78"], alarms=[111, 7, 8])
    for part in ("unknown object 'LAN-77'", "unknown object 'LAN-78'", "alarms [7, 8] are not defined", "LAN-01"):
        assert part in comment(conn)
    assert conn.execute("SELECT count(*) FROM job_steps").fetchone()["count"] == 0


def test_a_circle_of_important_alarms_is_named(conn, calculate):
    make_park(conn, alarms={1: (trigger(), [3]), 2: (trigger(), [1]), 3: (trigger(), [2]), 4: (trigger(), [])})
    with pytest.raises(jobs.JobRequestError):
        calculate(alarms=[1, 2, 4])
    assert "goes round in a circle: " in comment(conn)
    assert {"1", "2", "3"} <= set(comment(conn).split("circle: ")[1].split(";")[0].split(" -> "))


@pytest.mark.parametrize(("rule", "problem"), [
    ({}, "$: 'threshold_value' is a required property"),
    ([], "$: [] is not of type 'object'"),
    (trigger() | {"trigger_type": "count"}, "$.trigger_type: 'threshold' was expected"),
    (trigger() | {"threshold_type": "above"}, "$.threshold_type: 'above' is not one of ['high', 'low']"),
    (trigger() | {"threshold_value": "10"}, "$.threshold_value: '10' is not of type 'number'"),
    (trigger() | {"threshold_value": 10**400}, "$.threshold_value: 1000"),
    (trigger() | {"feature_name": 7}, "$.feature_name: 7 is not of type 'string'"),
    (trigger() | {"feature_name": "wind"},
     "$.feature_name: the model has no feature 'wind'; it has active_power, wind_speed"),
])
def test_a_malformed_trigger_fails_its_step_and_says_why(conn, calculate, rule, problem):
    make_park(conn)
    add_alarm(conn, 112, rule)
    add_samples(conn, every_ten_minutes([11]))
    assert len(calculate(alarms=[112, 111])) == 1
    assert "Malformed trigger of alarm 112 of model 'G97'" in comment(conn, "job_steps")
    assert problem in comment(conn, "job_steps")
    assert len(history(conn, 111)) == 1


def test_a_mended_trigger_and_what_depends_on_it_are_calculated_by_retry(conn, calculate):
    make_park(conn, alarms={111: ({}, []), 112: (trigger(value=8), [111]), 113: (trigger(value=8), [])})
    add_samples(conn, every_ten_minutes([9, 11]))
    assert len(calculate(alarms=[111, 112, 113])) == 2
    assert "more important alarm" in conn.execute(
        "SELECT comment FROM job_steps WHERE name = 'LAN-01 / alarm 112'").fetchone()["comment"]
    assert history(conn, 112) == []  # not the wrong periods

    conn.execute("UPDATE alarms SET trigger = %s WHERE manufacturer_id = 111", [jobs.Jsonb(trigger(value=10))])
    control.retry_job(conn, 1)
    job = claim(current_worker(), "Alarm Calculation")
    assert jobs.take_up(current_worker(), job).run() == []
    assert history(conn, 111) == [("LAN-01", 111, at(10), at(20))]
    assert history(conn, 112) == [("LAN-01", 112, at(0), at(10))]


@pytest.mark.parametrize(("change", "problem"), [
    ({"object_names": "LAN-01"}, "$.object_names: 'LAN-01' is not of type 'array'"),
    ({"object_names": []}, "$.object_names: [] should be non-empty"),
    ({"alarm_ids": [1.5]}, "$.alarm_ids[0]: 1.5 is not of type 'integer'"),
    ({"alarm_ids": [2**31]}, "$.alarm_ids[0]: 2147483648 is greater than the maximum"),
    ({"start": "2026-02-29 00:00:00"}, "day is out of range for month"),
    ({"end": "2026-03-01 00:00:00"}, "is not after"),
    ({"unit": "kW"}, "Additional properties are not allowed ('unit' was unexpected)"),
])
def test_wrong_parameters_are_refused(conn, ask, change, problem):
    with pytest.raises(jobs.JobRequestError) as exc:
        ask(**change)
    assert problem in str(exc.value)


# The invariant: any windows, in any order, twice, by any number of workers: the same rows.

def random_days(seed, days=6):
    """Return samples of some days with gaps, NULLs, NaNs and odd moments."""
    rng = random.Random(seed)
    values = [rng.choice([None, NAN, *[rng.gauss(10, 3)] * 20]) for _ in range(days * 144)]
    samples = every_ten_minutes(values)
    for start in rng.sample(range(len(values)), 12):
        for moment in list(samples)[start:start + rng.randrange(1, 20)]:
            samples.pop(moment, None)
    return {m + timedelta(seconds=rng.choice([0, 0, 0, 90])): v for m, v in samples.items()}


def random_cuts(rng, start, end, n):
    """Return `n` windows that cover [start, end), cut at odd seconds, in random order."""
    seconds = int((end - start).total_seconds())
    cuts = sorted({0, seconds, *(rng.randrange(1, seconds) for _ in range(n - 1))})
    windows = [(start + timedelta(seconds=a), start + timedelta(seconds=b))
               for a, b in itertools.pairwise(cuts)]
    rng.shuffle(windows)
    return windows


THREE_ALARMS = {111: (trigger(value=13), []), 112: (trigger(value=10), [111]),
                113: (trigger("low", "active_power", 10), [112, 111])}


@pytest.fixture
def days(conn):
    """Six days of two signals of two objects; return (start, end, expected history)."""
    make_park(conn, alarms=THREE_ALARMS)
    start, end = MIDNIGHT, MIDNIGHT + 6 * DAY
    expected = []
    for seed, name in enumerate(["LAN-01", "LAN-02"]):
        wind, power = random_days(seed), random_days(seed + 10)
        add_samples(conn, wind, name, 1)
        add_samples(conn, power, name, 2)
        high = periods(wind, lambda v: v > 13, start, end)
        middle = without(periods(wind, lambda v: v > 10, start, end), high)
        low = without(without(periods(power, lambda v: v < 10, start, end), high), middle)
        expected += [(name, number, *p) for number, found in ((111, high), (112, middle), (113, low)) for p in found]
    return start, end, sorted(expected)


EVERYTHING = {"objects": ["LAN-01", "LAN-02"], "alarms": [113, 112, 111]}


def test_one_job_gives_what_plain_python_gives(conn, calculate, days):
    start, end, expected = days
    calculate(start, end, **EVERYTHING)
    assert history(conn) == expected
    assert len(expected) > 300


@pytest.mark.parametrize("seed", range(3))
def test_any_windows_in_any_order_and_twice_give_the_same_rows(conn, calculate, days, seed):
    start, end, expected = days
    rng = random.Random(seed)
    windows = random_cuts(rng, start, end, 12)
    for window in [*windows, *rng.sample(windows, 3), (start + 2.5 * DAY, start + 4.1 * DAY)]:
        calculate(*window, **EVERYTHING)
    assert history(conn) == expected


def test_many_workers_at_once_give_the_same_rows(conn, ask, days, run_handler):
    start, end, expected = days
    rng = random.Random(7)
    for window in random_cuts(rng, start, end, 30) + random_cuts(rng, start, end, 10):
        ask(*window, **EVERYTHING)
    run_handler("--once", "--workers", "4")
    assert conn.execute("SELECT count(DISTINCT state) FROM job_instances").fetchone()["count"] == 1
    assert history(conn) == expected


def test_two_calculations_of_one_alarm_take_turns(conn, dsn, ask):
    """The second one must see what the first has committed while it was waiting."""
    make_park(conn)
    add_samples(conn, every_ten_minutes([11] * 6))
    with perfdb.connect(dsn) as first, ThreadPoolExecutor(1) as pool:
        ids = [ask(at(0), at(30)), ask(at(30), at(60))]
        steps = [conn.execute("INSERT INTO job_steps (job_instance_id, position, object_id, alarm_id) "
                              "VALUES (%s, 1, 1, 1) RETURNING id", [job_id]).fetchone()["id"] for job_id in ids]
        with first.transaction():
            compute(first, steps[0], at(0), at(30))
            second = pool.submit(compute_alone, dsn, steps[1], at(30), at(60))

            wait_for(lambda: conn.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchone())
        second.result(timeout=20)
    assert history(conn) == [("LAN-01", 111, at(0), at(60))]


def compute(connection, step_id, start, end):
    connection.execute(alarm_calc.TAKE_TURNS_SQL, {"step_id": step_id})
    connection.execute(alarm_calc.CALCULATE_SQL, {"step_id": step_id, "start": start, "end": end, "alarms": 1})


def compute_alone(dsn, *args):
    with perfdb.connect(dsn) as connection, connection.transaction():
        compute(connection, *args)


# A real turbine's year.

@pytest.fixture(scope="module")
def real_year():
    if not REAL_YEAR.exists():
        pytest.skip(f"no {REAL_YEAR.name} beside the project: a real year is not part of it")
    power, wind = {}, {}
    with REAL_YEAR.open(encoding="latin-1") as file:
        for moment, active_power, wind_speed, *_ in list(csv.reader(file))[1:]:
            stamp = datetime.strptime(moment, "%d %m %Y %H:%M").replace(tzinfo=UTC)
            power[stamp], wind[stamp] = float(active_power), float(wind_speed)
    assert len(power) == 50530
    return power, wind


def test_a_real_year_at_once_or_in_months_is_what_plain_python_gives(conn, calculate, real_year):
    power, wind = real_year
    make_park(conn, alarms={1: (trigger("high", "wind_speed", 15), []),
                            2: (trigger("high", "active_power", 3500), [1]),
                            3: (trigger("low", "active_power", 10), [])})
    with conn.cursor().copy("COPY feature_values FROM STDIN") as copy:
        for feature_id, samples in ((1, wind), (2, power)):
            for stamp, value in samples.items():
                copy.write_row((1, feature_id, stamp, value))
    start, end = datetime(2018, 1, 1, tzinfo=UTC), datetime(2019, 1, 1, tzinfo=UTC)
    storm = periods(wind, lambda v: v > 15, start, end)
    full = without(periods(power, lambda v: v > 3500, start, end), storm)
    still = periods(power, lambda v: v < 10, start, end)
    expected = sorted(("LAN-01", n, *p) for n, found in ((1, storm), (2, full), (3, still)) for p in found)
    assert min(len(storm), len(full), len(still)) > 50

    months = [(datetime(2018, m, 1, tzinfo=UTC), datetime(2018 + m // 12, m % 12 + 1, 1, tzinfo=UTC))
              for m in range(1, 13)]
    random.Random(2018).shuffle(months)
    for window in months:
        assert calculate(*window, alarms=[1, 2, 3]) == []
    assert history(conn) == expected

    conn.execute("TRUNCATE alarms_history")
    assert calculate(start, end, alarms=[1, 2, 3]) == []
    assert history(conn) == expected
