"""Schedules: every window gets exactly one job, whoever looks, whenever."""

import itertools
import threading
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
import sample_jobs  # noqa: F401  the types Noop and Scripted
from helpers import wait_for

import control
import perfdb
import schedules


@pytest.fixture
def schedule(conn):
    """Add a schedule for the type Noop by plain INSERT; return its id."""
    control.write_types(conn, ["Noop"])

    def schedule(every, next_start, delay="0", **columns):
        return conn.execute(
            "INSERT INTO job_schedules (job_type_id, parameters, every, next_start, delay, enabled) "
            "SELECT id, '{\"steps\": 1}', %s, %s, %s, %s FROM job_types WHERE name = 'Noop' RETURNING id",
            [every, next_start, delay, columns.get("enabled", True)]).fetchone()["id"]
    return schedule


@pytest.fixture
def windows(conn):
    def windows():
        rows = conn.execute("SELECT parameters FROM job_instances ORDER BY id").fetchall()
        return [(perfdb.parse_time(r["parameters"]["start"]), perfdb.parse_time(r["parameters"]["end"])) for r in rows]
    return windows


NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
HOUR = timedelta(hours=1)


@pytest.mark.parametrize(("now", "due"), [
    (NOON + 1.99 * HOUR, 0), (NOON + 2 * HOUR, 1), (NOON + 2.99 * HOUR, 1), (NOON + 5.5 * HOUR, 4),
])
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
    assert (job["schedule_id"], job["description"], job["state"]) == (schedule_id, "nightly", "Created")
    assert job["parameters"] == {"steps": 1, "start": "2026-03-01 12:00:00+00:00", "end": "2026-03-02 12:00:00+00:00"}


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
    assert windows() == [(NOON + timedelta(minutes=n), NOON + timedelta(minutes=n + 1)) for n in range(2500)]


@pytest.mark.parametrize("zone", ["Europe/Madrid", "America/New_York"])
@pytest.mark.parametrize(("every", "count"), [("1 day", 731), ("1 month", 24), ("1 week", 104)])
def test_two_years_of_windows_keep_their_calendar_length(conn, dsn, schedule, windows, monkeypatch, zone, every, count):
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
    for t in threads: t.start()
    for t in threads: t.join()

    found = sorted(windows())
    assert len(found) == count
    assert all(a[1] == b[0] for a, b in itertools.pairwise(found))  # none lost, none twice
    assert all(t.astimezone(here).hour == 0 for window in found for t in window)
    lengths = {end - start for start, end in found}
    if every == "1 day":
        assert lengths == {timedelta(hours=23), timedelta(hours=24), timedelta(hours=25)}


def test_a_schedule_whose_parameters_do_not_fit_spoils_only_its_own_jobs(conn, schedule, run_handler):
    now = datetime.now(UTC)
    schedule("1 hour", now - 2.5 * HOUR)
    control.write_types(conn, ["Scripted"])
    conn.execute("INSERT INTO job_schedules (job_type_id, parameters, every, next_start) "
                 "SELECT id, '{}', '1 hour', %s FROM job_types WHERE name = 'Scripted'", [now - 1.5 * HOUR])
    run_handler("--once", "--module", "sample_jobs", expect=1)
    rows = conn.execute("SELECT state, comment FROM v_job_instances ORDER BY job_type").fetchall()
    assert [r["state"] for r in rows] == ["Finished", "Finished", "Failed"]
    assert "'steps' is a required property" in rows[2]["comment"]


def test_schedules_of_a_running_handler_are_kept(conn, schedule, start_handler, windows):

    schedule("1 hour", datetime.now(UTC) - HOUR + timedelta(seconds=0.5))
    start_handler("--module", "sample_jobs")
    wait_for(windows)
