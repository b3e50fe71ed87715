"""Alarm Calculation against the same calculation in plain Python."""

import contextlib
import csv
import itertools
import math
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from helpers import flush_statistics, wait_for
from park import (
    DAY,
    MIDNIGHT,
    OneStep,
    add_alarm,
    add_samples,
    at,
    comment,
    define,
    every_ten_minutes,
    history,
    make_park,
    periods,
    run_claimed,
    trigger,
    without,
)

import alarm_calc
import control
import jobs
import perfdb
from worker import Worker, use_worker

pytest_plugins = ["alarm_fixtures"]

NAN = math.nan
REAL_YEAR = Path(__file__).parents[2] / "shared" / "data" / "yalova_2018_10min.csv"


def test_a_plan_made_on_an_empty_history_does_not_read_it_whole_later(conn, dsn, ask):
    """A plan is kept and used for the other objects, when the history has grown meanwhile."""
    names = [f"LAN-{n}" for n in range(30)]
    make_park(conn, objects=names)
    for name in names:
        add_samples(conn, every_ten_minutes([11, 9] * 20), name)
    conn.execute("VACUUM alarms_history, alarms_detected")  # now PostgreSQL knows they are empty
    before = rows_read(conn)
    job_id = ask(objects=names)
    worker = Worker(dsn)
    use_worker(worker)
    alarm_calc.JobAlarmCalc(job_id).run()
    assert worker.connection.execute(  # nor is it made anew for every window
        "SELECT count(*), sum(custom_plans) FROM pg_prepared_statements "
        "WHERE statement LIKE '%alarms_detected%'").fetchone() == (1, 0)
    flush_statistics(worker.connection)
    read = rows_read(conn) - before  # before we look ourselves
    assert len(history(conn)) == 30 * 20
    assert read <= 30 * 20  # each object's own at most once; else 30 * 20 * 30 / 2 and more
    use_worker(None)
    worker.close()


def test_a_night_reads_no_long_history(conn, dsn):
    """Neither of the alarm nor of what it gives way to."""
    make_park(conn, alarms={111: (trigger(), []), 112: (trigger(value=8), [111])})
    add_samples(conn, every_ten_minutes([11, 9] * 6))
    for table in ("alarms_detected", "alarms_history"):
        conn.execute(f"INSERT INTO {table} (object_id, alarm_id, start_time, end_time) "
                     "SELECT 1, a, t, t + interval '5 min' FROM generate_series(1, 2) AS a, "
                     "generate_series(%s::timestamptz - interval '5000 h', %s, '1 h') AS t",
                     [at(0), at(-60)])
    before = rows_read(conn)
    with perfdb.connect(dsn) as connection:
        for alarm_id in (1, 2):
            OneStep(connection, 1, alarm_id, start="2026-03-01 00:00:00",
                    end="2026-03-02 00:00:00").run()
        flush_statistics(connection)
    assert rows_read(conn) - before < 100
    assert len(history(conn, 112)) == 5000 + 6


def rows_read(conn):
    """Return how many rows of the two layers have been read so far, in tests before as well."""
    flush_statistics(conn)
    return conn.execute("SELECT sum(t.seq_tup_read + i.idx_tup_read) AS read "
                        "FROM pg_stat_user_tables t JOIN pg_stat_user_indexes i USING (relid) "
                        "WHERE t.relname LIKE 'alarms\\_%'").fetchone()["read"]


@pytest.mark.parametrize(("rule", "values", "expected"), [
    pytest.param(trigger("high", value=10), [9, 11, 12, 9], [(10, 30)], id="high"),
    pytest.param(trigger("low", value=10), [9, 11, 8, 9], [(0, 10), (20, 40)], id="low"),
    pytest.param(trigger("high", value=10), [10, 10.000001], [(10, 20)], id="high is strict"),
    pytest.param(trigger("low", value=10), [10, 9.999999], [(10, 20)], id="low is strict"),
    pytest.param(trigger("high", value=10), [11, NAN, 11, None, 11], [(0, 10), (20, 30), (40, 50)],
                 id="NaN and NULL do not trigger high"),
    pytest.param(trigger("low", value=10), [9, NAN, 9, None, 9], [(0, 10), (20, 30), (40, 50)],
                 id="NaN and NULL do not trigger low"),
    pytest.param(trigger("high", value=10), [math.inf, -math.inf], [(0, 10)],
                 id="infinite values are values"),
    pytest.param(trigger("high", value=-1), [], [], id="no samples"),
])
def test_threshold(conn, calculate, rule, values, expected):
    make_park(conn, alarms={111: (rule, [])})
    add_samples(conn, every_ten_minutes(values))
    assert calculate() == []
    assert history(conn) == [("LAN-01", 111, at(low), at(high)) for low, high in expected]


@pytest.mark.parametrize(("start", "end"), [
    ("2026-03-01T00:10:00Z", "2026-03-01T00:30:00Z"),
    ("2026-03-01T00:10:00", "2026-03-01T00:30:00"),
    ("2026-02-28 21:10:00-0300", "2026-03-01T01:30:00+01:00"),
])
def test_times_as_front_ends_write_them(conn, calculate, start, end):
    make_park(conn)
    add_samples(conn, every_ten_minutes([11] * 6))
    assert calculate(start=start, end=end) == []
    assert history(conn) == [("LAN-01", 111, at(10), at(30))]


def test_a_missing_sample_ends_an_alarm(conn, calculate):
    make_park(conn)
    add_samples(conn, {at(10): 11, at(20): 11, at(40): 11})
    calculate()
    assert history(conn) == [("LAN-01", 111, at(0), at(20)), ("LAN-01", 111, at(30), at(40))]


def test_samples_need_not_come_in_order(conn, calculate):
    """As from a table of one's own without an index."""
    make_park(conn)
    conn.execute("ALTER TABLE feature_values DROP CONSTRAINT feature_values_pkey")
    samples = every_ten_minutes([11, 11, 9, 11])
    add_samples(conn, dict(reversed(samples.items())))
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
    for number, low, high in [(111, -50, 5), (111, 15, 20), (111, 25, 70), (111, 90, 95),
                              (112, 10, 30)]:
        conn.execute("INSERT INTO alarms_history (object_id, alarm_id, start_time, end_time) "
                     "SELECT 1, id, %s, %s FROM alarms WHERE manufacturer_id = %s",
                     [at(low), at(high), number])
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
    make_park(conn, alarms={111: (trigger(), []), 112: (trigger(value=8, max_gap=60), [111])})
    add_samples(conn, every_ten_minutes([11, 9] * 20))

    def rows():
        return [conn.execute(f"SELECT xmin::text, * FROM {table} ORDER BY alarm_id, start_time"
                             ).fetchall() for table in ("alarms_detected", "alarms_history")]
    calculate(alarms=[111, 112])
    before = rows()
    calculate(alarms=[112])
    calculate(at(15), at(215), alarms=[111, 112])
    assert rows() == before
    assert [len(layer) for layer in before] == [21, 40]


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
    add_samples(conn, every_ten_minutes([None, NAN, 9]), "LAN-02")
    calculate(at(0), at(60), objects=["LAN-02", "LAN-01"])
    steps = conn.execute("SELECT name, object_id, alarm_id, feature_id, result FROM job_steps "
                         "ORDER BY position").fetchall()
    assert [tuple(s.values()) for s in steps] == [
        ("LAN-02 / alarm 111", 2, 1, 1,
         {"periods": 0, "seconds": 0, "samples": 1, "coverage": 0.166667}),
        ("LAN-01 / alarm 111", 1, 1, 1,
         {"periods": 1, "seconds": 1200, "samples": 3, "coverage": 0.5})]


@pytest.mark.parametrize(("stamps", "low", "high", "samples", "coverage"), [
    pytest.param(range(10, 61, 10), 0, 60, 6, 1.0, id="all"),
    pytest.param([10, 30], 5, 27, 2, 12 / 22, id="edges within samples"),
    pytest.param([10, 20, 30], 0, 25, 3, 1.0, id="end within a sample"),
    pytest.param([10, 30], 0, 20, 1, 0.5, id="begins at the end"),
    pytest.param([10, 15, 20, 40], 0, 40, 4, 0.75, id="overlapping"),
    pytest.param([11, 20, 31, 40], 0, 40, 4, 38 / 40, id="some late"),
    pytest.param([10, 20], 100, 110, 0, 0.0, id="none"),
])
def test_samples_and_coverage(conn, calculate, stamps, low, high, samples, coverage):
    make_park(conn)
    add_samples(conn, {at(minute): 9 for minute in stamps})
    calculate(at(low), at(high))
    result = conn.execute("SELECT result FROM job_steps").fetchone()["result"]
    assert (result["samples"], result["coverage"]) == (samples, round(coverage, 6))


# Requests that cannot be calculated.

def test_all_unknown_objects_and_alarms_are_named_before_any_step(conn, calculate):
    make_park(conn)
    with pytest.raises(jobs.JobRequestError):
        calculate(objects=["LAN-77", "LAN-01", "LAN-78"], alarms=[111, 7, 8])
    for part in ("unknown object 'LAN-77'", "unknown object 'LAN-78'",
                 "alarms [7, 8] are not defined", "LAN-01"):
        assert part in comment(conn)
    assert conn.execute("SELECT count(*) FROM job_steps").fetchone()["count"] == 0


def test_a_circle_of_important_alarms_is_named(conn, calculate):
    make_park(conn, alarms={1: (trigger(), [3]), 2: (trigger(), [1]), 3: (trigger(), [2]),
                            4: (trigger(), [])})
    with pytest.raises(jobs.JobRequestError):
        calculate(alarms=[1, 2, 4])
    assert "goes round in a circle: " in comment(conn)
    assert {"1", "2", "3"} <= set(comment(conn).split("circle: ")[1].split(";")[0].split(" -> "))


@pytest.mark.parametrize(("rule", "problem"), [
    ({}, "$: 'threshold_value' is a required property"),
    (trigger() | {"hysteresis": 2}, "'hysteresis' was unexpected"),
    (trigger() | {"Threshold_value": 2}, "$: the keys of a trigger are trigger_type, threshold_t"),
    (trigger(min_duration="60"), "$.min_duration: '60' is not of type 'number'"),
    (trigger(max_gap=-1), "$.max_gap: -1 is less than the minimum of 0"),
    ([], "$: [] is not of type 'object'"),
    (trigger() | {"trigger_type": "count"}, "$.trigger_type: 'threshold' was expected"),
    (trigger("above"), "$.threshold_type: 'above' is not one of ['high', 'low']"),
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


def test_a_trigger_python_cannot_read_fails_its_step(conn, calculate):
    make_park(conn)
    conn.execute("UPDATE alarms SET trigger = "
                 "jsonb_set(trigger, '{threshold_value}', to_jsonb(1e5000))")
    assert len(calculate()) == 1
    assert "Malformed trigger of alarm 111" in comment(conn, "job_steps")


def test_a_retried_step_settles_the_alarms_that_were_calculated_meanwhile(conn, calculate):
    make_park(conn, alarms={111: ({}, []), 112: (trigger(value=8), [111])})
    add_samples(conn, every_ten_minutes([9, 11]))
    assert len(calculate(alarms=[111, 112])) == 1
    assert history(conn) == [("LAN-01", 112, at(0), at(20))]

    define(conn, 111, trigger=trigger(value=10))
    control.retry_job(conn, 1)
    assert run_claimed() == []
    assert history(conn) == [("LAN-01", 111, at(10), at(20)), ("LAN-01", 112, at(0), at(10))]


@pytest.mark.parametrize(("sql", "problem"), [
    ("DELETE FROM alarms", "was deleted after the job was created"),
    ("UPDATE objects SET object_model_id = 2", "no longer of the model 'G97'"),
    ("UPDATE alarms SET non_overlapping_alarms = '{111}'", "goes round in a circle: 111 -> 111"),
])
def test_what_changed_since_the_job_was_created_fails_its_step(conn, ask, dsn, sql, problem):
    make_park(conn)
    conn.execute("INSERT INTO object_models (id, object_type_id, name) VALUES (2, 1, 'V90')")
    add_samples(conn, every_ten_minutes([11]))
    with contextlib.closing(Worker(dsn)) as worker:
        use_worker(worker)
        job = alarm_calc.JobAlarmCalc(ask())
        conn.execute(sql)
        assert len(job.run()) == 1
        use_worker(None)
    assert problem in comment(conn, "job_steps")
    assert history(conn) == []


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
        expected += [(name, number, *p) for number, found in
                     ((111, high), (112, middle), (113, low)) for p in found]
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


def test_two_calculations_of_one_object_take_turns(conn, dsn, ask, start_handler):
    """The second one must see what the first has committed while it was waiting."""
    make_park(conn)
    add_samples(conn, every_ten_minutes([11] * 6))
    ask(at(30), at(60))
    with perfdb.connect(dsn) as first, first.transaction():
        first.execute(alarm_calc.TAKE_TURNS_SQL, {"object_id": 1})
        handler = start_handler("--once")
        wait_for(lambda: conn.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchone())
        for table in ("alarms_detected", "alarms_history"):
            first.execute(f"INSERT INTO {table} (object_id, alarm_id, start_time, end_time) "
                          "VALUES (1, 1, %s, %s)", [at(0), at(30)])
    assert handler.wait(20) == 0
    assert history(conn) == [("LAN-01", 111, at(0), at(60))]


def test_a_definition_changed_while_waiting_is_followed(conn, dsn, ask, start_handler):
    """What was calculated by it, before ours, is not replaced by what the old one finds."""
    make_park(conn)
    add_samples(conn, every_ten_minutes([11, 13]))
    ask()
    with perfdb.connect(dsn) as first, first.transaction():
        first.execute(alarm_calc.TAKE_TURNS_SQL, {"object_id": 1})
        handler = start_handler("--once")
        wait_for(lambda: conn.execute("SELECT 1 FROM pg_locks WHERE NOT granted").fetchone())
        define(first, 111, trigger(value=12))
    assert handler.wait(20) == 0
    assert history(conn) == [("LAN-01", 111, at(10), at(20))]


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


def test_a_real_year_at_once_or_in_months_is_what_plain_python_gives(conn, calculate, real_year,
                                                                     ask, run_handler):
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
    expected = sorted(("LAN-01", n, *p) for n, found in ((1, storm), (2, full), (3, still))
                      for p in found)
    assert min(len(storm), len(full), len(still)) > 50

    firsts = [*(datetime(2018, month, 1, tzinfo=UTC) for month in range(1, 13)), end]
    months = list(itertools.pairwise(firsts))
    random.Random(2018).shuffle(months)
    for window in months:
        assert calculate(*window, alarms=[1, 2, 3]) == []
    assert history(conn) == expected

    conn.execute("TRUNCATE alarms_history, alarms_detected")
    assert calculate(start, end, alarms=[1, 2, 3]) == []
    assert history(conn) == expected

    conn.execute("TRUNCATE alarms_history, alarms_detected")
    jobs_of_the_year = [(window, number) for window in months for number in (1, 2)]
    random.Random(2019).shuffle(jobs_of_the_year)
    for window, number in jobs_of_the_year:
        ask(*window, alarms=[number])
    run_handler("--once", "--workers", "3")
    assert history(conn) == [row for row in expected if row[1] in (1, 2)]
