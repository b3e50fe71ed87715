"""An allocation comes once: lost answers, late work, two jobs, killed workers, lost sessions."""

import signal
import threading

import psycopg
import pytest
from bazefield_fixtures import DAY, HOUR, LAN_01, LAN_02, T0, WANTED, insert_parameters
from fake_bazefield_http import FAULTS
from helpers import wait_for

import baze_insert_alloc
import bazefield
import control

NAME = "Bazefield Insert Allocation"


@pytest.fixture
def notes(conn):
    """What of inserts is noted at this moment: (object, type), sorted."""
    return lambda: sorted((r["bazefield_id"], r["allocation_type_id"]) for r in conn.execute(
        "SELECT * FROM bazefield_inserts"))


@pytest.mark.parametrize("fault", ["504 late", "cut late", "never late", "html late", "deep late",
                                   "524 late", "compressed late"])
def test_what_arrives_after_its_answer_was_lost_is_seen_and_not_sent_again(
        scada, insert, monkeypatch, notes, fault):
    monkeypatch.setenv("BAZEFIELD_TIMEOUT", "0.2")
    monkeypatch.setitem(FAULTS, "524", (524, "a timeout occurred", {}))
    monkeypatch.setitem(FAULTS, "compressed", (200, "\x1f", {"Content-Encoding": "gzip"}))
    scada.ways.late = {}
    scada.faults += [("insert_allocation", fault)]
    _, steps = insert()
    assert steps[0]["result"]["inserted"] == [71]
    assert scada.standing(LAN_01) == [WANTED]
    assert len(scada.calls("insert_allocation")) == 1
    assert notes() == []


@pytest.mark.parametrize("seconds", [61, 100])
def test_what_arrives_after_the_step_has_given_up_is_seen_by_the_next_try(scada, insert, notes,
                                                                         seconds):
    scada.ways.late = {}
    scada.faults += [("insert_allocation", "503")]
    scada.before["allocations"] = lambda r: scada.before.clear() or scada.later(
        seconds, lambda: scada.add_allocation(LAN_01, 10, T0, T0 + DAY))
    _, steps = insert()
    assert steps[0]["comment"] == (
        "insert_allocation: status 503: down for maintenance, but it is not there 60 s later and "
        "was not sent again. Nothing stands in its place. Confirm the field names (python "
        "bazefield.py --check); jobctl retry looks again first")
    assert (scada.standing(LAN_01), notes()) == ([], [(LAN_01, 1)])
    _, steps = insert()  # the sender's limit and as long again are not over
    assert steps[0]["result"]["standing"] == [71]
    assert (scada.standing(LAN_01), notes()) == ([WANTED], [])


def test_another_window_waits_for_what_may_still_arrive(scada, insert):
    scada.ways.late = {}
    scada.faults += [("insert_allocation", "503")]
    scada.before["allocations"] = lambda r: scada.before.clear() or scada.later(
        100, lambda: scada.add_allocation(LAN_01, 10, T0, T0 + DAY))
    insert()
    _, steps = insert(start="2026-03-01 06:00:00")
    assert "Other allocations stand in the window, nothing was inserted: 71" in steps[0]["comment"]


def test_what_never_arrived_is_sent_again_once_it_can_no_longer_come(scada, insert, conn, notes):
    scada.faults += [("insert_allocation", "cut before")]
    insert()
    conn.execute("UPDATE bazefield_inserts SET may_arrive_until = clock_timestamp()")
    _, steps = insert()
    assert steps[0]["result"]["inserted"] == [71]
    assert (scada.standing(LAN_01), notes()) == ([WANTED], [])


def test_what_was_refused_is_not_waited_for(scada, insert, notes):
    scada.faults += [("insert_allocation", "reply error")]
    insert()
    assert notes() == []


def test_a_lost_answer_to_the_insert_of_a_remainder_deletes_nothing(scada, insert):
    scada.add_allocation(LAN_01, 11, T0 - HOUR, T0 + HOUR)
    scada.ways.late = {}
    scada.faults += [("insert_allocation", "503")]
    _, steps = insert(on_overlap="replace")
    assert "status 503" in steps[0]["comment"]
    assert scada.standing(LAN_01) == [(11, T0 - HOUR, T0 + HOUR)]
    assert scada.calls("delete_allocation") == []


def test_main_and_child_of_a_lost_insert(scada, insert, conn, notes):
    scada.ways.late = {}
    scada.after["insert_allocation"] = lambda r: (
        scada.after.clear() or scada.faults.append(("insert_allocation", "503")))
    insert(child_category="Grid")
    assert (scada.standing(LAN_01), notes()) == ([WANTED], [(LAN_01, 2)])
    _, steps = insert(child_category="Grid")
    assert (steps[0]["result"]["standing"], steps[0]["result"]["inserted"]) == ([71], [72])


# Taking turns.

LOCK = "SELECT {}(hashtext('bazefield allocations'), hashtext('%s 1'))" % LAN_01  # noqa: UP031


def test_a_step_waits_for_one_on_the_same_object_and_type(scada, insert, conn, pauses):
    conn.execute(LOCK.format("pg_advisory_lock"))
    _, steps = insert(["LAN-01", "LAN-02"])
    assert (f"Another step has been at the allocations of {LAN_01} 1 for 600 s"
            in steps[0]["comment"])
    assert sum(pauses) >= 600
    assert (scada.standing(LAN_01), scada.standing(LAN_02)) == ([], [WANTED])
    conn.execute(LOCK.format("pg_advisory_unlock"))
    assert insert()[1][0]["state"] == "Finished"


@pytest.mark.parametrize("fault", [None, "500"])
def test_the_turn_is_over_with_the_step(scada, insert, conn, fault):
    scada.faults += [("insert_allocation", fault)] if fault else []
    insert(child_category="Grid")
    assert conn.execute(LOCK.format("pg_try_advisory_lock")).fetchone() == {
        "pg_try_advisory_lock": True}


def test_a_step_that_is_timed_out_gives_up_its_turn_and_keeps_its_note(plain, insert, conn, notes):
    conn.execute("UPDATE job_types SET step_timeout = '300 ms'")
    plain.faults += [("insert_allocation", "never")]
    _, steps = insert()
    assert "Timed out" in steps[0]["comment"]
    assert notes() == [(LAN_01, 1)]
    conn.execute("UPDATE job_types SET step_timeout = '1 h'")
    assert insert()[1][0]["result"]["standing"] == [71]
    assert notes() == []


@pytest.mark.parametrize("operation", ["allocations", "allocation"])
def test_a_step_that_has_lost_its_connection_writes_nothing(scada, insert, conn, operation):
    scada.add_allocation(LAN_01, 11, T0, T0 + HOUR)
    scada.add_allocation(LAN_01, 10, T0, T0 + DAY)
    if operation == "allocations":
        scada.allocations.clear()

    def cut_off(_request):
        if operation == "allocations" or len(scada.calls("allocation")) > 1:
            conn.execute("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                         "WHERE datname = current_database() AND pid <> pg_backend_pid()")
    scada.after[operation] = cut_off
    with pytest.raises(psycopg.OperationalError):
        insert(on_overlap="replace")
    assert scada.calls("insert_allocation") + scada.calls("delete_allocation") == []


def test_steps_side_by_side_insert_once(scada, plant, dsn, conn):
    """Four sessions at once, as four handlers would be, each with a client of its own."""
    scada.ways.hangs_up = False
    barrier, results, errors = threading.Barrier(4), [], []
    kind = baze_insert_alloc.Kind(1, "Internal")

    def step():
        client = bazefield.Client(bazefield.read_settings())
        try:
            with psycopg.connect(dsn, autocommit=True) as connection:
                place = baze_insert_alloc.Place(client, connection, LAN_01, kind,
                                                baze_insert_alloc.Wanted(10, T0, T0 + DAY))
                barrier.wait()
                with baze_insert_alloc.turn([place]):
                    results.append(baze_insert_alloc.put([place], "fail"))
        except Exception as exc:
            errors.append(exc)
    threads = [threading.Thread(target=step) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert errors == []
    assert scada.standing(LAN_01) == [WANTED]
    assert sorted(len(r["inserted"]) for r in results) == [0, 0, 0, 1]


# Real handlers.

def test_a_worker_killed_during_the_insert_and_two_equal_jobs_insert_once(
        plain, plant, conn, start_handler, run_handler, monkeypatch):
    plain.real_time = True
    monkeypatch.setenv("BAZEFIELD_TIMEOUT", "3")
    for _ in range(2):
        control.create_job(conn, NAME, insert_parameters())
    plain.faults += [("insert_allocation", "never late")]
    first = start_handler("--once", "--limit", "1")
    wait_for(lambda: plain.calls("insert_allocation"))
    second = start_handler("--once")  # its job waits for its turn
    wait_for(lambda: conn.execute(
        "SELECT FROM job_instances WHERE state = 'Running'").rowcount == 2)
    first.send_signal(signal.SIGKILL)
    assert second.wait(40) == 0
    run_handler("--once")
    assert [r["state"] for r in conn.execute("SELECT state FROM job_instances")] == [
        "Finished", "Finished"]
    assert plain.standing(LAN_01) == [WANTED]
    assert len(plain.calls("insert_allocation")) == 1
    assert plain.standing(LAN_02) == []
