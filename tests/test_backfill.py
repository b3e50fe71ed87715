"""Backfill: jobs for windows that lack one, as far as they are asked for."""

import threading
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
import sample_jobs  # noqa: F401  the type Noop
from helpers import wait_for

import control
import jobctl
import parameters
import schedules

MONDAY = datetime(2026, 3, 2, tzinfo=UTC)
DAY = timedelta(days=1)
ENDED = {
    "missing": [],
    "failed": ["Failed"],
    "finished": ["Finished"],
    "tried twice": ["Failed", "Finished"],
    "waiting": ["Created"],
    "running again": ["Failed", "Running"],
}


@pytest.fixture
def schedule(conn):
    """A daily schedule whose first six days went as ENDED says; it owes nothing more."""
    control.write_types(conn, ["Noop"])
    conn.execute(
        "INSERT INTO job_schedules (job_type_id, parameters, every, first_start, next_start) "
        "SELECT id, '{\"steps\": 1}', '1 day', %s, %s FROM job_types",
        [MONDAY, MONDAY + 6 * DAY],
    )
    for n, states in enumerate(ENDED.values()):
        for state in states:
            conn.execute(
                "INSERT INTO job_instances (job_type_id, state, started, finished, schedule_id, "
                "window_start) "
                "SELECT id, %(state)s, CASE WHEN %(state)s <> 'Created' THEN now() END, "
                "CASE WHEN %(state)s IN ('Failed', 'Finished') THEN now() END, 1, %(start)s "
                "FROM job_types",
                {"state": state, "start": MONDAY + n * DAY},
            )
    return 1


@pytest.fixture
def created(conn):
    """Run what it is given and return the days whose windows have got a job by it, as 0 to 5."""

    def created(work):
        before = conn.execute("SELECT COALESCE(max(id), 0) AS id FROM job_instances").fetchone()[
            "id"
        ]
        work()
        rows = conn.execute(
            "SELECT window_start FROM job_instances WHERE id > %s ORDER BY id", [before]
        ).fetchall()
        return [(row["window_start"] - MONDAY).days for row in rows]

    return created


@pytest.mark.parametrize(
    ("which", "days"), [("missing", [0]), ("failed", [0, 1]), ("all", [0, 1, 2, 3])]
)
def test_windows_get_a_job_as_far_as_they_are_asked_for(conn, schedule, created, which, days):
    def ask():
        schedules.backfill(conn, schedule, MONDAY, MONDAY + 6 * DAY, which)

    assert created(ask) == days
    assert created(ask) == []  # none of them has ended


def test_each_window_is_told_with_its_reason(conn, schedule):
    found = schedules.windows(conn, schedule, MONDAY, MONDAY + 6 * DAY, "failed")
    assert [(w.start, w.end) for w in found] == [
        (MONDAY + n * DAY, MONDAY + (n + 1) * DAY) for n in range(6)
    ]
    assert [(w.jobs, w.create, w.why) for w in found] == [
        ("", True, "has no job"),
        ("1 Failed", True, "has no job that Finished"),
        ("2 Finished", False, "has a job that Finished"),
        ("3 Failed, 4 Finished", False, "has a job that Finished"),
        ("5 Created", False, "has a job that has not ended"),
        ("6 Failed, 7 Running", False, "has a job that has not ended"),
    ]


def test_a_job_has_the_schedules_parameters_and_its_window(conn, schedule):
    [job_id] = schedules.backfill(conn, schedule, MONDAY, MONDAY + DAY)
    job = conn.execute("SELECT * FROM job_instances WHERE id = %s", [job_id]).fetchone()
    assert (job["schedule_id"], job["window_start"], job["state"]) == (schedule, MONDAY, "Created")
    assert job["parameters"] == {
        "steps": 1,
        "start": "2026-03-02 00:00:00+00:00",
        "end": "2026-03-03 00:00:00+00:00",
    }


def test_windows_before_the_schedule_began_count_from_its_anchor_too(conn, schedule, created):
    conn.execute("UPDATE job_schedules SET every = '1 month', first_start = '2026-01-31'")
    assert [
        (w.start.strftime("%m-%d"), w.end.strftime("%m-%d"))
        for w in schedules.windows(
            conn, schedule, datetime(2025, 11, 1, tzinfo=UTC), datetime(2026, 2, 28, tzinfo=UTC)
        )
    ] == [("11-30", "12-31"), ("12-31", "01-31"), ("01-31", "02-28")]


def test_a_window_that_is_not_over_gets_no_job(conn, schedule, created):
    today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    conn.execute("UPDATE job_schedules SET first_start = %s", [today])
    found = schedules.windows(conn, schedule, today - DAY, today + 3 * DAY, "all")
    assert [w.create for w in found] == [True, False, False, False]
    conn.execute("UPDATE job_schedules SET delay = '1 day'")
    found = schedules.windows(conn, schedule, today - DAY, today, "all")
    assert [w.why for w in found] == ["is not over yet"]


def test_jobs_of_version_1_count_though_they_do_not_know_their_window(conn, schedule, created):
    conn.execute("DELETE FROM job_instances")
    conn.execute("UPDATE job_schedules SET next_start = first_start")
    schedules.create_due_jobs(conn, MONDAY + 2 * DAY)
    conn.execute("UPDATE job_instances SET window_start = NULL")
    assert created(lambda: schedules.backfill(conn, schedule, MONDAY, MONDAY + 3 * DAY)) == [2]


@pytest.mark.parametrize(
    ("schedule_id", "days", "text"),
    [
        (7, 1, "there is no schedule 7; python jobctl.py schedule list shows them"),
        (1, 0, "--to 2026-03-02 00:00:00+00:00 is not after --from 2026-03-02 00:00:00+00:00"),
        (
            1,
            1001,
            "these are more than 1000 windows; do them in parts, the first with "
            "--to '2028-11-26 00:00:00+00:00'",
        ),
    ],
)
def test_what_cannot_be_done_is_said(conn, schedule, schedule_id, days, text):
    with pytest.raises(parameters.JobRequestError) as exc:
        schedules.windows(conn, schedule_id, MONDAY, MONDAY + days * DAY)
    assert str(exc.value) == text
    assert (
        len(schedules.windows(conn, 1, MONDAY, datetime(2028, 11, 26, tzinfo=UTC))) == 1000
    )  # the remedy


def test_parameters_that_do_not_fit_create_nothing(conn, schedule):
    control.write_types(conn, ["Scripted"])
    conn.execute(
        "UPDATE job_schedules SET job_type_id = (SELECT id FROM job_types WHERE name = 'Scripted')"
    )
    with pytest.raises(
        parameters.JobRequestError, match="1 is not of type 'array'"
    ):
        schedules.backfill(conn, schedule, MONDAY, MONDAY + DAY)
    assert conn.execute("SELECT count(*) FROM job_instances").fetchone()["count"] == 7


def test_backfills_and_the_schedule_at_the_same_moment_make_one_job_per_window(
    conn, dsn, schedule
):
    conn.execute("DELETE FROM job_instances")
    conn.execute("UPDATE job_schedules SET next_start = first_start")
    barrier = threading.Barrier(4)

    def work(do):
        with psycopg.connect(dsn, autocommit=True) as connection:
            barrier.wait()
            do(connection)

    def fill(connection):
        schedules.backfill(connection, schedule, MONDAY, MONDAY + 200 * DAY)

    threads = [
        threading.Thread(target=work, args=[do])
        for do in (fill, fill, lambda c: schedules.create_due_jobs(c, MONDAY + 100 * DAY), fill)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    schedules.create_due_jobs(conn, MONDAY + 100 * DAY)  # if it was passed by
    assert conn.execute(
        "SELECT count(*), count(DISTINCT window_start) AS windows FROM job_instances "
        "WHERE window_start < %s",
        [MONDAY + 100 * DAY],
    ).fetchone() == {"count": 100, "windows": 100}


def test_a_backfill_waits_for_the_schedule_and_sees_what_it_made(conn, dsn, schedule, created):
    conn.execute("DELETE FROM job_instances")
    conn.execute("UPDATE job_schedules SET next_start = first_start")
    with psycopg.connect(dsn) as handler, psycopg.connect(dsn, autocommit=True) as connection:
        schedules.create_due_jobs(handler, MONDAY + 2 * DAY)
        handler.execute("UPDATE job_instances SET state = 'Failed', finished = now()")
        thread = threading.Thread(
            target=schedules.backfill, args=(connection, schedule, MONDAY, MONDAY + 3 * DAY)
        )
        thread.start()
        wait_for(
            lambda: conn.execute("SELECT FROM pg_locks WHERE NOT granted").fetchone() is not None
        )
        handler.commit()
        thread.join()
    rows = conn.execute("SELECT window_start FROM job_instances ORDER BY 1").fetchall()
    assert [row["window_start"] for row in rows] == [MONDAY, MONDAY + DAY, MONDAY + 2 * DAY]


def test_no_two_unfinished_jobs_of_a_window_whoever_asks(conn, schedule):
    again = schedules.backfill(conn, schedule, MONDAY + DAY, MONDAY + 2 * DAY, "failed")
    with pytest.raises(ValueError, match="another unfinished job has its unique_key or window"):
        control.retry_job(conn, 1)
    conn.execute(
        "UPDATE job_instances SET state = 'Failed', finished = now() WHERE id = ANY(%s)", [again]
    )
    assert control.retry_job(conn, 1) == "Created"


def test_the_command_lists_or_creates(conn, schedule, created, capsys):
    period = ["backfill", "1", "--from", "2026-03-02 00:00:00Z", "--to", "2026-03-08 00:00:00Z"]
    assert created(lambda: jobctl.main([*period, "--failed", "--dry-run"])) == []
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 6
    for word in ("yes", "has no job that Finished", "1 Failed"):
        assert word in lines[3]
    assert created(lambda: jobctl.main([*period, "--failed"])) == [0, 1]
    assert capsys.readouterr().out == "8\n9\n"
    assert created(lambda: jobctl.main(period)) == []
