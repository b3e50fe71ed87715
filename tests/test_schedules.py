"""Schedules: every window gets exactly one job, whoever looks, whenever."""

import itertools
import re
import threading
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import conftest
import psycopg
import pytest
import sample_jobs  # noqa: F401  the types Noop and Scripted
from helpers import wait_for

import control
import parameters
import perfdb
import schedules


@pytest.fixture
def schedule(conn):
    """Add a schedule for the type Noop by plain INSERT; return its id."""
    control.write_types(conn, ["Noop"])

    def schedule(every, next_start, delay="0", **columns):
        return conn.execute(
            "INSERT INTO job_schedules (job_type_id, parameters, every, next_start, delay, "
            "enabled) SELECT id, '{\"steps\": 1}', %s, %s, %s, %s FROM job_types "
            "WHERE name = 'Noop' RETURNING id",
            [every, next_start, delay, columns.get("enabled", True)],
        ).fetchone()["id"]

    return schedule


@pytest.fixture
def windows(conn):
    def windows():
        rows = conn.execute("SELECT parameters FROM job_instances ORDER BY id").fetchall()
        return [
            (
                perfdb.parse_time(r["parameters"]["start"]),
                perfdb.parse_time(r["parameters"]["end"]),
            )
            for r in rows
        ]

    return windows


NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


@pytest.mark.parametrize(
    ("now", "due"),
    [
        (NOON + 1.99 * HOUR, 0),
        (NOON + 2 * HOUR, 1),
        (NOON + 2.99 * HOUR, 1),
        (NOON + 5.5 * HOUR, 4),
    ],
)
def test_a_window_is_due_when_it_is_over_and_the_delay_too(conn, schedule, windows, now, due):
    schedule("1 hour", NOON, delay="1 hour")
    schedules.create_due_jobs(conn, now)
    assert windows() == [(NOON + n * HOUR, NOON + (n + 1) * HOUR) for n in range(due)]
    assert schedules.create_due_jobs(conn, now) == []


def test_a_job_has_the_schedules_parameters_and_its_window(conn, schedule):
    schedule_id = schedule("1 day", NOON)
    conn.execute("UPDATE job_schedules SET description = 'nightly'")
    schedules.create_due_jobs(conn, NOON + timedelta(days=1))
    job = conn.execute("SELECT * FROM job_instances").fetchone()
    assert (job["schedule_id"], job["description"], job["state"]) == (
        schedule_id,
        "nightly",
        "Created",
    )
    assert job["parameters"] == {
        "steps": 1,
        "start": "2026-03-01 12:00:00+00:00",
        "end": "2026-03-02 12:00:00+00:00",
    }


def test_a_disabled_schedule_waits_and_catches_up(conn, schedule, windows):
    schedule("1 hour", NOON, enabled=False)
    assert schedules.create_due_jobs(conn, NOON + 3 * HOUR) == []
    conn.execute("UPDATE job_schedules SET enabled = true")
    schedules.create_due_jobs(conn, NOON + 3 * HOUR)
    assert len(windows()) == 3


def test_a_long_absence_is_made_up_in_bounded_pieces(conn, schedule, windows):
    schedule("1 minute", NOON)
    now = NOON + timedelta(minutes=2500)
    assert [len(schedules.create_due_jobs(conn, now)) for _ in range(4)] == [1000, 1000, 500, 0]
    assert windows() == [
        (NOON + timedelta(minutes=n), NOON + timedelta(minutes=n + 1)) for n in range(2500)
    ]


CALENDAR = [
    pytest.param(
        "UTC",
        "2026-01-31",
        "1 month",
        ["02-28", "03-31", "04-30", "05-31", "06-30"],
        "MM-DD",
        id="the 31st comes back",
    ),
    pytest.param(
        "UTC",
        "2024-02-29",
        "1 year",
        ["2025-02-28", "2026-02-28", "2027-02-28", "2028-02-29"],
        "YYYY-MM-DD",
        id="29 February comes back",
    ),
    pytest.param(
        "Europe/Madrid",
        "2026-03-28 02:30",
        "1 day",
        ["29 03:30", "30 02:30", "31 02:30"],
        "DD HH24:MI",
        id="02:30 comes back after the night without",
    ),
    pytest.param(
        "Europe/Madrid",
        "2026-10-25 00:00",
        "1 hour",
        ["01+02", "02+02", "02+01", "03+01"],
        "HH24TZH",
        id="an hour that comes twice is two windows",
    ),
    pytest.param(
        "Pacific/Apia",
        "2011-12-29 10:00",
        "1 day",
        ["31", "01", "02"],
        "DD",
        id="a day that never was is no window",
    ),
]


@pytest.mark.parametrize(("zone", "first", "every", "ends", "shown"), CALENDAR)
def test_windows_are_counted_from_the_anchor(conn, schedule, zone, first, every, ends, shown):
    conn.execute("SELECT set_config('TimeZone', %s, false)", [zone])
    schedule(every, first)
    last = conn.execute(
        "SELECT %s::timestamptz + %s * %s::interval AS at",
        [first, len(ends) + (zone == "Pacific/Apia"), every],
    ).fetchone()["at"]
    schedules.create_due_jobs(conn, last)
    found = conn.execute(
        "SELECT to_char((parameters ->> 'end')::timestamptz, %s) AS at, "
        "window_start = (parameters ->> 'start')::timestamptz AS as_said, "
        "window_start = lag((parameters ->> 'end')::timestamptz, 1, %s) OVER (ORDER BY id) "
        "AS joins "
        "FROM job_instances ORDER BY id",
        [shown, first],
    ).fetchall()
    assert [row["at"] for row in found] == ends
    assert all(row["as_said"] and row["joins"] for row in found)


# What job_schedule_window_end finds from an estimate, and what it should: the first of all points.
FIRST_POINT_SQL = """
SELECT at
  FROM generate_series(%(first)s::timestamptz - interval '40 years', '2066-01-01',
                       '97 days 05:00') AS at
 WHERE job_schedule_window_end(%(first)s, %(every)s::interval, at) IS DISTINCT FROM (
       SELECT min(point)
         FROM generate_series(-600, 600) AS n,
              LATERAL (SELECT %(first)s::timestamptz + n * %(every)s::interval) AS p (point)
        WHERE point > at)
"""


@pytest.mark.parametrize("zone", ["Europe/Madrid", "Pacific/Apia"])
@pytest.mark.parametrize(
    "every", ["1 month", "2 months", "1 year", "13 months 3 days", "30 days 12:00", "100 days"]
)
def test_a_window_ends_at_the_first_point_after_its_start_near_the_anchor_and_far(
    conn, zone, every
):
    conn.execute("SELECT set_config('TimeZone', %s, false)", [zone])
    assert (
        conn.execute(FIRST_POINT_SQL, {"first": "2026-01-31 02:30", "every": every}).fetchall()
        == []
    )


def test_an_anchor_on_a_day_that_never_was_is_a_window_late_nowhere(conn):
    """Samoa had no 30 December 2011: a day from the anchor back is two by the calendar."""
    conn.execute("SET TimeZone = 'Pacific/Apia'")
    assert conn.execute(
        "SELECT job_schedule_window_end('2011-12-30 10:00', '1 day', point - interval '1 us') "
        "= point AS ok FROM (VALUES ('2011-07-14 10:00'::timestamptz)) AS p (point)"
    ).fetchone() == {"ok": True}


def test_a_window_set_by_hand_reaches_to_the_next_that_is_counted(conn, schedule, windows):
    schedule("1 day", NOON)
    conn.execute("UPDATE job_schedules SET next_start = %s", [NOON + 5 * HOUR])
    schedules.create_due_jobs(conn, NOON + 48 * HOUR)
    assert windows() == [(NOON + 5 * HOUR, NOON + 24 * HOUR), (NOON + 24 * HOUR, NOON + 48 * HOUR)]


def test_one_of_first_start_and_next_start_is_enough(conn, schedule):
    for column in ("first_start", "next_start"):
        conn.execute(
            f"INSERT INTO job_schedules (job_type_id, every, {column}) "
            "SELECT id, '1 day', %s FROM job_types",
            [NOON],
        )
    rows = conn.execute("SELECT first_start, next_start FROM job_schedules").fetchall()
    assert rows == [{"first_start": NOON, "next_start": NOON}] * 2
    with pytest.raises(psycopg.errors.NotNullViolation):
        conn.execute(
            "INSERT INTO job_schedules (job_type_id, every) SELECT id, '1 day' FROM job_types"
        )


@pytest.mark.parametrize(
    "every",
    ["0.3 s", "1 month -29 days", "1 day 0.5 s", "1 day -1 hour", "0", "-1 day", "101 years"],
)
def test_windows_that_make_no_sense_are_refused(conn, schedule, every):
    with pytest.raises(psycopg.errors.CheckViolation):
        schedule(every, NOON)
    with pytest.raises(parameters.JobRequestError, match=f"^every '{every}'"):
        schedules.add_schedule(conn, "Noop", {}, every=every, start=NOON)
    assert conn.execute("SELECT count(*) FROM job_schedules").fetchone()["count"] == 0


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"every": "often"}, "every 'often', delay '0s': invalid input syntax for type interval"),
        ({"every": "1 day", "delay": "-1 s"}, "delay '-1 s' is not between 0 and 100 years"),
        (
            {"every": "1 day", "start": datetime(1800, 1, 1, tzinfo=UTC)},
            "start 1800-01-01 00:00:00+00:00 is not in the",
        ),
    ],
)
def test_what_makes_no_schedule_is_said(conn, schedule, given, text):
    with pytest.raises(parameters.JobRequestError, match=re.escape(text)):
        schedules.add_schedule(conn, "Noop", {}, **{"start": NOON} | given)


@pytest.mark.parametrize(
    "every", ["1 second", "15 minutes", "25 hours", "1 day 6 hours", "1 month 1 day", "100 years"]
)
def test_windows_that_make_sense_are_taken(conn, schedule, every):
    assert schedules.add_schedule(conn, "Noop", {}, every=every, start=NOON) == 1


def test_schedules_of_version_1_go_on_where_they_are(conn, schedule):
    conn.execute(
        "ALTER TABLE job_schedules DROP COLUMN first_start, "
        "DROP CONSTRAINT schedule_every_makes_windows"
    )
    conn.execute("DROP TRIGGER job_schedules_start ON job_schedules")
    for every in ("1 day", "0.3 s", "1 month -29 days"):
        schedule(every, NOON)
    conn.execute((conftest.ROOT / "schema.sql").read_text())
    rows = conn.execute("SELECT first_start, enabled FROM job_schedules ORDER BY id").fetchall()
    assert [(r["first_start"], r["enabled"]) for r in rows] == [
        (NOON, True),
        (NOON, False),
        (NOON, False),
    ]
    assert len(schedules.create_due_jobs(conn, NOON + 48 * HOUR)) == 2


def test_catching_up_goes_by_age_whatever_the_schedule(conn, schedule):
    for _ in range(2):
        schedule("1 hour", NOON, delay="5 minutes")
    schedules.create_due_jobs(conn, NOON + 3.5 * HOUR)
    rows = conn.execute(
        "SELECT schedule_id, window_start, run_after FROM job_instances ORDER BY run_after, id"
    ).fetchall()
    assert [r["schedule_id"] for r in rows] == [1, 2] * 3
    assert {r["run_after"] - r["window_start"] for r in rows} == {timedelta(minutes=65)}


def test_a_window_that_has_a_job_gets_no_second_one(conn, schedule, windows):
    """By hand the schedule is set back, and a backfill was there before it."""
    schedule("1 hour", NOON)
    schedules.create_due_jobs(conn, NOON + 2 * HOUR)
    conn.execute("UPDATE job_instances SET state = 'Failed', finished = now()")
    conn.execute("UPDATE job_schedules SET next_start = first_start")
    schedules.backfill(conn, 1, NOON + 3 * HOUR, NOON + 4 * HOUR)
    schedules.create_due_jobs(conn, NOON + 5 * HOUR)
    assert sorted(windows()) == [(NOON + n * HOUR, NOON + (n + 1) * HOUR) for n in range(5)]
    assert schedules.create_due_jobs(conn, NOON + 5 * HOUR) == []


def test_a_schedule_somebody_is_at_is_passed_by_without_waiting(conn, schedule, dsn):
    for _ in range(2):
        schedule("1 hour", NOON)
    conn.execute("SET lock_timeout = '1s'")  # waiting would end in an error
    with psycopg.connect(dsn) as other:
        other.execute("SELECT FROM job_schedules WHERE id = 1 FOR UPDATE")
        failed = []
        schedules.create_due_jobs(conn, NOON + HOUR, lambda *what: failed.append(what))
        assert not failed
    assert conn.execute("SELECT schedule_id FROM job_instances").fetchall() == [{"schedule_id": 2}]


def test_where_nothing_is_due_nothing_is_written(conn, schedule):
    schedule("1 hour", NOON)
    schedule("1 day", datetime.now(UTC))
    conn.execute("SET default_transaction_read_only = on")
    assert schedules.create_due_jobs(conn, NOON + 0.5 * HOUR) == []


def test_whether_anything_is_due_is_asked_without_making_it(conn, schedule):
    def due():
        return conn.execute(f"SELECT {schedules.ANY_DUE} AS due").fetchone()["due"]

    schedule("1 hour", datetime.now(UTC) - HOUR, delay="1 minute")
    assert not due()
    schedule("1 hour", datetime.now(UTC) - HOUR, delay="0")
    assert due()
    conn.execute("UPDATE job_schedules SET enabled = false")
    assert not due()


@pytest.mark.parametrize("zone", ["Europe/Madrid", "America/New_York"])
@pytest.mark.parametrize(("every", "count"), [("1 day", 731), ("1 month", 24), ("1 week", 104)])
def test_two_years_of_windows_keep_their_calendar_length(
    conn, dsn, schedule, windows, monkeypatch, zone, every, count
):
    """Several handlers look at the same moment, again and again; the clock is the test's."""
    monkeypatch.setenv("PERFDB_TIMEZONE", zone)
    here = ZoneInfo(zone)
    first, last = datetime(2026, 1, 1, tzinfo=here), datetime(2028, 1, 2, tzinfo=here)
    schedule(every, first)
    clock = [first.astimezone(UTC) + n * timedelta(days=29.3) for n in range(26)]
    clock = [now for now in clock if now < last.astimezone(UTC)] + [last.astimezone(UTC)]

    def look():
        with perfdb.connect(dsn) as connection:
            for now in clock:
                barrier.wait()
                schedules.create_due_jobs(connection, now)
                barrier.wait()
                schedules.create_due_jobs(connection, now)  # whoever was passed by looks again

    barrier = threading.Barrier(3)
    threads = [threading.Thread(target=look) for _ in range(3)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()

    found = sorted(windows())
    assert len(found) == count
    assert all(a[1] == b[0] for a, b in itertools.pairwise(found))  # none lost, none twice
    assert all(t.astimezone(here).hour == 0 for window in found for t in window)
    lengths = {end - start for start, end in found}
    if every == "1 day":
        assert lengths == {timedelta(hours=23), timedelta(hours=24), timedelta(hours=25)}


def test_a_schedule_whose_parameters_do_not_fit_spoils_only_its_own_jobs(
    conn, schedule, run_handler
):
    now = datetime.now(UTC)
    schedule("1 hour", now - 2.5 * HOUR)
    control.write_types(conn, ["Scripted"])
    conn.execute(
        "INSERT INTO job_schedules (job_type_id, parameters, every, next_start) "
        "SELECT id, '{}', '1 hour', %s FROM job_types WHERE name = 'Scripted'",
        [now - 1.5 * HOUR],
    )
    run_handler("--once", "--module", "sample_jobs", expect=1)
    rows = conn.execute("SELECT state, comment FROM v_job_instances ORDER BY job_type").fetchall()
    assert [r["state"] for r in rows] == ["Finished", "Finished", "Failed"]
    assert "'steps' is a required property" in rows[2]["comment"]


@pytest.fixture
def refusing_site(conn):
    """A trigger of the site's own refuses the jobs of schedule 1."""
    conn.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE 'no jobs on Sundays'; END $$"
    )
    conn.execute(
        "CREATE TRIGGER refuse BEFORE INSERT ON job_instances FOR EACH ROW "
        "WHEN (NEW.schedule_id = 1) EXECUTE FUNCTION refuse()"
    )
    yield
    conn.execute("DROP FUNCTION refuse CASCADE")


def test_a_schedule_that_the_database_refuses_does_not_stop_the_others(
    conn, schedule, refusing_site
):
    for _ in range(3):
        schedule("1 hour", NOON)
    failed = []
    ids = schedules.create_due_jobs(conn, NOON + HOUR, lambda *what: failed.append(what))
    assert conn.execute("SELECT id, schedule_id FROM job_instances ORDER BY id").fetchall() == [
        {"id": ids[0], "schedule_id": 2},
        {"id": ids[1], "schedule_id": 3},
    ]
    [(schedule_id, exc)] = failed
    assert (schedule_id, exc.diag.message_primary) == (1, "no jobs on Sundays")
    assert [
        r["next_start"] for r in conn.execute("SELECT next_start FROM job_schedules ORDER BY id")
    ] == [NOON, NOON + HOUR, NOON + HOUR]


def test_a_handler_says_which_schedule_it_cannot_keep_and_goes_on(
    conn, schedule, refusing_site, run_handler
):
    schedule("1 hour", datetime.now(UTC) - HOUR)
    control.create_job(conn, "Noop", {})
    done = run_handler("--once", "--module", "sample_jobs")
    assert "schedule=1 cannot create its jobs: no jobs on Sundays" in done.stderr
    assert conn.execute("SELECT state FROM job_instances").fetchone()["state"] == "Finished"


def test_schedules_of_a_running_handler_are_kept(conn, schedule, start_handler, windows):
    schedule("1 hour", datetime.now(UTC) - HOUR + timedelta(seconds=0.5))
    start_handler("--module", "sample_jobs")
    wait_for(windows)
