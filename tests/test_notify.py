"""Who is woken: a NOTIFY takes a lock of the whole database, so none is sent for nothing."""

import pytest

INSERT = "INSERT INTO job_instances (job_type_id) SELECT id FROM job_types"


@pytest.fixture
def notified(conn, dsn):
    """Run statements in one transaction and return how many notifications they sent."""
    conn.execute("INSERT INTO job_types (name) VALUES ('A'), ('B')")
    conn.execute("LISTEN job_instances")

    def notified(*statements):
        with conn.transaction():
            for statement in statements:
                conn.execute(statement)
        return len(list(conn.notifies(timeout=0)))

    return notified


@pytest.mark.parametrize(
    ("statements", "count"),
    [
        pytest.param([INSERT], 1, id="two jobs in one statement"),
        pytest.param([INSERT, INSERT], 1, id="two statements in one transaction"),
        pytest.param([f"{INSERT} WHERE name = 'nobody''s'"], 0, id="no job"),
        pytest.param(
            [f"{INSERT} ON CONFLICT DO NOTHING", "DELETE FROM job_instances"],
            1,
            id="a job that is gone again",
        ),
        pytest.param(["UPDATE job_types SET max_running = 1"], 0, id="something else"),
        pytest.param(["SET LOCAL perfdb.notify = 'off'", INSERT], 0, id="off"),
        pytest.param(["SET LOCAL perfdb.notify = 'on'", INSERT], 1, id="on"),
    ],
)
def test_workers_are_woken_once_for_new_jobs_and_for_nothing_else(notified, statements, count):
    assert notified(*statements) == count


def test_a_look_at_schedules_that_owe_nothing_wakes_nobody(notified, conn):
    """An INSERT that finds nothing to insert is a statement too."""
    import schedules

    conn.execute(
        "INSERT INTO job_schedules (job_type_id, every, first_start) SELECT id, '1 day', now() "
        "FROM job_types"
    )
    assert schedules.create_due_jobs(conn) == []
    assert notified("SELECT 1") == 0
