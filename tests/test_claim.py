"""The claim: which job is next, and that finding it does not depend on what may not be taken."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from helpers import wait_for

from claims import CANDIDATE_CTE

TAKE_SQL = f"""
WITH {CANDIDATE_CTE}
UPDATE job_instances j SET worker_id = 4711 FROM candidate WHERE j.id = candidate.id RETURNING j.id
"""


@pytest.fixture
def jobs(conn):
    """Insert jobs of a type, and the type; return their ids."""
    conn.execute("INSERT INTO job_types (name) VALUES ('A'), ('B'), ('Unknown here')")

    def jobs(type_name="A", count=1, **columns):
        values = {"priority": "0", "run_after": "now()", "description": "''"} | columns
        rows = conn.execute(
            f"INSERT INTO job_instances (job_type_id, {', '.join(values)}) "
            f"SELECT id, {', '.join(values.values())} "
            f"FROM job_types, generate_series(1, {count}) n "
            "WHERE name = %s RETURNING id",
            [type_name],
        ).fetchall()
        return [row["id"] for row in rows]

    return jobs


@pytest.fixture
def take(conn):
    """Claim a job of the types A and B and return its id, None if there is none."""

    def take(connection=conn, with_tests=False):
        row = connection.execute(
            TAKE_SQL, {"types": '["A", "B"]', "with_tests": with_tests}
        ).fetchone()
        return row and (row["id"] if isinstance(row, dict) else row[0])

    return take


def test_the_next_job_has_the_highest_priority_and_was_due_first(jobs, take):
    [last] = jobs("A", priority="-1", run_after="now() - interval '2 days'")
    [third] = jobs("B", priority="5", run_after="now() - interval '1 hour'")
    [second] = jobs("A", priority="5", run_after="now() - interval '2 hours'")
    jobs("A", priority="7", run_after="now() + interval '1 hour'")
    [first] = jobs("B", priority="6")
    [fourth] = jobs("B")
    jobs("Unknown here", priority="9")
    assert [take() for _ in range(6)] == [first, second, third, fourth, last, None]


def test_jobs_asked_for_at_once_run_in_their_order_however_they_are_found(jobs, take, conn):
    ids = jobs(count=5)
    conn.execute(
        "UPDATE job_instances SET description = 'now last in the file' WHERE id = %s", [ids[0]]
    )
    conn.execute("SET enable_indexscan = off")
    assert [take() for _ in range(5)] == ids


def test_a_job_that_was_put_off_is_as_old_as_the_moment_it_is_due(jobs, take):
    [put_off] = jobs(run_after="now() - interval '1 minute'")
    [due_longer] = jobs(run_after="now() - interval '1 hour'")
    assert [take(), take()] == [due_longer, put_off]


@pytest.mark.parametrize("description", ["test", "the latest", "TESTING"])
def test_a_test_job_is_taken_in_its_turn_by_whoever_runs_them(jobs, take, description):
    [plain] = jobs()
    [test] = jobs(description=f"'{description}'", priority="1")
    assert [take(), take()] == [plain, None]
    assert take(with_tests=True) == test


@pytest.mark.parametrize("held", [1, 2, 3])
def test_jobs_somebody_holds_are_passed_over_without_waiting(jobs, take, conn, dsn, held):
    """Two at the top, one of another type below, one at the bottom."""
    ids = jobs("A", 2, priority="5") + jobs("B", priority="3") + jobs("A")
    conn.execute("SET lock_timeout = '1s'")  # waiting would raise LockNotAvailable
    with psycopg.connect(dsn) as other:
        other.execute("SELECT FROM job_instances WHERE id = ANY(%s) FOR UPDATE", [ids[:held]])
        assert take() == ids[held]


def test_a_job_behind_one_that_somebody_holds_is_not_taken_before_its_time(jobs, take, conn, dsn):
    [held] = jobs()
    jobs(run_after="now() + interval '1 hour'")
    with psycopg.connect(dsn) as other:
        other.execute("SELECT FROM job_instances WHERE id = %s FOR UPDATE", [held])
        assert take() is None


def test_a_job_that_was_taken_meanwhile_is_looked_at_again(jobs, take, conn, dsn):
    """A snapshot older than somebody else's claim: the row is checked anew when it is locked."""
    [first], [second] = jobs(), jobs()
    conn.execute("UPDATE job_types SET max_running = 5 WHERE name = 'A'")
    conn.execute("ALTER FUNCTION job_type_has_room RENAME TO real_job_type_has_room")
    conn.execute(
        "CREATE FUNCTION job_type_has_room(int, int) RETURNS bool LANGUAGE sql VOLATILE "
        "AS 'SELECT pg_advisory_lock(1) IS NOT NULL'"
    )  # asked when the levels have been read
    with (
        psycopg.connect(dsn, autocommit=True) as slow,
        psycopg.connect(dsn) as holder,
        ThreadPoolExecutor() as threads,
    ):
        holder.execute("SELECT pg_advisory_lock(1)")
        claim = threads.submit(take, slow)
        wait_for(
            lambda: conn.execute(
                "SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
            ).fetchall()
        )
        conn.execute("UPDATE job_instances SET worker_id = 1 WHERE id = %s", [first])
        holder.close()
        assert claim.result(timeout=20) == second
    conn.execute("DROP FUNCTION job_type_has_room")
    conn.execute("ALTER FUNCTION real_job_type_has_room RENAME TO job_type_has_room")


def test_a_full_type_is_left_alone_and_the_others_are_taken(jobs, take, conn):
    jobs("A", 3, priority="1")
    [other] = jobs("B")
    conn.execute("UPDATE job_types SET max_running = 1 WHERE name = 'A'")
    assert [take() is None for _ in range(3)] == [False, False, True]
    assert (
        conn.execute(
            "SELECT count(*) FROM job_instances WHERE worker_id IS NOT NULL AND id <> %s", [other]
        ).fetchone()["count"]
        == 1
    )


@pytest.mark.parametrize(
    ("max_running", "run_after"), [(0, "now()"), (5, "now() + interval '1 hour'")]
)
def test_nobody_is_held_back_by_a_claim_that_cannot_want_his_type(
    jobs, take, conn, dsn, max_running, run_after
):
    jobs("A", priority="1", run_after=run_after)
    [other_type] = jobs("B")
    conn.execute("UPDATE job_types SET max_running = %s WHERE name = 'A'", [max_running])
    with psycopg.connect(dsn) as hanging:
        assert take(hanging) == other_type
        assert not conn.execute("SELECT FROM pg_locks WHERE locktype = 'advisory'").fetchall()


def test_a_type_whose_claimer_hangs_is_passed_over(jobs, take, conn, dsn):
    """Somebody who has claimed and not committed holds the type, and nobody waits for him."""
    ids = jobs("A", 2, priority="1") + jobs("B", 2)
    conn.execute("UPDATE job_types SET max_running = 5 WHERE name = 'A'")
    conn.execute("SET statement_timeout = '5s'")
    with psycopg.connect(dsn) as hanging:
        assert take(hanging) == ids[0]
        assert [take(), take(), take()] == [ids[2], ids[3], None]
    assert take() == ids[1]


def test_who_wants_the_same_type_at_the_same_moment_waits_a_moment(jobs, take, conn, dsn):
    """Else a worker would find nothing, and end or sleep, while there is work."""
    ids = jobs("A", 2)
    conn.execute("UPDATE job_types SET max_running = 5 WHERE name = 'A'")
    conn.execute(
        "CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN PERFORM pg_sleep(0.03); RETURN NULL; END $$"
    )
    conn.execute(
        "CREATE CONSTRAINT TRIGGER slow AFTER UPDATE ON job_instances "
        "DEFERRABLE INITIALLY DEFERRED "
        "FOR EACH ROW EXECUTE FUNCTION slow()"
    )  # a COMMIT that takes 30 ms
    with psycopg.connect(dsn, autocommit=True) as other, ThreadPoolExecutor() as threads:
        barrier = threading.Barrier(2)
        taken = threads.map(
            lambda connection: (barrier.wait(), take(connection))[1], [conn, other]
        )
        assert set(taken) == set(ids)
    conn.execute("DROP TRIGGER slow ON job_instances")
    conn.execute("DROP FUNCTION slow")


DUE_TOMORROW = {"run_after": "now() + interval '1 day'"}


@pytest.mark.parametrize(
    "what",
    [
        pytest.param([("A", DUE_TOMORROW)], id="future"),
        pytest.param([("A", DUE_TOMORROW | {"priority": "n %% 5"})], id="future, many priorities"),
        pytest.param([("Unknown here", {})], id="unknown type"),
        pytest.param([("Paused", {})], id="paused"),
        pytest.param([("Full", {})], id="full"),
        pytest.param([("A", {"description": "'latest'"})], id="test"),
        pytest.param(
            [
                ("A", DUE_TOMORROW),
                ("Paused", {"priority": "2"}),
                ("Unknown here", {}),
                ("Full", {}),
                ("A", {"description": "'latest'", "priority": "1"}),
            ],
            id="all of them",
        ),
    ],
)
def test_behind_jobs_that_may_not_be_taken_a_claim_reads_no_more_of_them(jobs, conn, what):
    conn.execute("INSERT INTO job_types (name, max_running) VALUES ('Paused', 0), ('Full', 1)")
    jobs("Full", worker_id="4711")
    for type_name, columns in what:
        jobs(type_name, 2000 // len(what), **columns)
    [wanted] = jobs("A", priority="-1")
    conn.execute("ANALYZE job_instances")
    params = {"types": '["A", "B", "Full", "Paused"]', "with_tests": False}
    plan = conn.execute("EXPLAIN (ANALYZE, FORMAT JSON) " + TAKE_SQL, params).fetchone()[
        "QUERY PLAN"
    ]
    assert rows_read(plan[0]["Plan"]) < 20, json.dumps(plan, indent=1)
    assert (
        conn.execute("SELECT worker_id FROM job_instances WHERE id = %s", [wanted]).fetchone()[
            "worker_id"
        ]
        == 4711
    )


def rows_read(node):
    """How many rows of job_instances a plan has looked at, those left out included."""
    own = 0
    if node.get("Relation Name") == "job_instances" and "Scan" in node["Node Type"]:
        own = node["Actual Loops"] * (node["Actual Rows"] + node.get("Rows Removed by Filter", 0))
    return own + sum(rows_read(child) for child in node.get("Plans", ()))
