"""Bazefield Tag Delete against the stand-in: the window goes and nothing else, come what may."""

import itertools
import json
import time
from datetime import UTC, datetime, timedelta

import fake_bazefield
import pytest
from bazefield_fixtures import (
    CURED,
    DAY,
    END,
    FATAL,
    LAN_01,
    LAN_02,
    MINUTE,
    OUTSIDE,
    START,
    T0,
    times,
)
from fake_bazefield import Ways
from park import MIDNIGHT

import baze_tag_delete
import bazefield
import bazefield_http
import control
import jobs

# Tag delete.

@pytest.mark.parametrize("inclusive", [True, False])
def test_the_window_is_deleted_and_nothing_else(scada, delete, inclusive):
    scada.ways.delete_includes_to = inclusive
    before = times(scada, "WindSpeed"), times(scada, object_id=LAN_02)
    job, steps = delete()
    assert (job["state"], steps[0]["name"]) == ("Finished", "LAN-01 / ActivePower")
    assert steps[0]["result"] == {"found": 144, "deleted": 144}
    assert times(scada) == OUTSIDE
    assert (times(scada, "WindSpeed"), times(scada, object_id=LAN_02)) == before


@pytest.mark.parametrize("inclusive", [True, False])
def test_a_sample_in_the_last_millisecond_goes_and_the_one_at_the_end_stays(scada, delete,
                                                                           inclusive):
    scada.ways.delete_includes_to = inclusive
    scada.objects[LAN_01]["points"]["ActivePower"] |= {T0 + DAY - 1: 1.0}
    assert delete()[1][0]["result"] == {"found": 145, "deleted": 145}
    assert times(scada) == OUTSIDE


@pytest.mark.parametrize("inclusive", [True, False])
@pytest.mark.parametrize("seconds", [1.0, 14.0, 40.0])
def test_a_server_that_deletes_late_is_waited_for_and_the_end_is_safe(scada, delete, seconds,
                                                                     inclusive):
    scada.ways.late, scada.ways.delete_includes_to = {"delete": seconds}, inclusive
    scada.objects[LAN_01]["points"]["ActivePower"] |= {T0 + DAY - 1: 1.0}
    _, steps = delete()
    scada.advance(100)
    in_time = seconds < baze_tag_delete.LATE_SECONDS
    assert steps[0]["state"] == ("Finished" if in_time else "Failed")
    assert set(OUTSIDE) <= set(times(scada))


@pytest.mark.parametrize("inclusive", [True, False])
def test_somebody_who_writes_the_last_millisecond_again_does_not_cost_the_end(plain, delete,
                                                                             inclusive):
    plain.ways.delete_includes_to = inclusive
    values = plain.objects[LAN_01]["points"]["ActivePower"]
    values[T0 + DAY - 1] = 1.0
    plain.after["delete"] = lambda r: values.update({T0 + DAY - 1: 1.0, T0 + DAY: 1.0})
    _, steps = delete()
    assert "1 of 145 samples are still there" in steps[0]["comment"]
    assert all(int(r["to"]) < T0 + DAY for r in plain.calls("delete") if r["to"].isdecimal())


@pytest.mark.parametrize("understands", [
    lambda text: fake_bazefield.to_ms(datetime.max.replace(tzinfo=UTC)),  # no such time: no bound
    lambda text: T0 + DAY,                                                # rounds up
    lambda text: T0 + DAY - 1,                                            # cuts off
])
def test_a_last_millisecond_that_cannot_be_told_apart_is_left(scada, delete, monkeypatch,
                                                             understands):
    numbers = fake_bazefield.moment
    monkeypatch.setattr(fake_bazefield, "moment", lambda text: (
        numbers(text) if text.isdecimal() else understands(text)))
    scada.ways = Ways(delete_includes_to=False, read_includes_to=False)
    scada.objects[LAN_01]["points"]["ActivePower"] |= {T0 + DAY - 1: 1.0, T0 + DAY + 1: 1.0}
    _, steps = delete()
    if understands("") == T0 + DAY:  # exactly the end, left out by both: then it may go
        assert steps[0]["state"] == "Finished"
    else:
        assert "All but the last millisecond (2026-03-01 23:59:59.999Z) is deleted" \
            in steps[0]["comment"]
    assert {*OUTSIDE, T0 + DAY + 1} <= set(times(scada))


def test_more_samples_than_a_server_gives_at_once(scada, delete):
    scada.ways.take_cap = 5_000
    seconds = {T0 + n * 1_000: 1.0 for n in range(25_000)}
    scada.objects[LAN_01]["points"]["ActivePower"] = dict(seconds)
    assert delete()[1][0]["result"] == {"found": 25_000, "deleted": 25_000}
    assert times(scada) == []


@pytest.mark.parametrize("cap", [1, 2, 3])
def test_a_server_that_gives_next_to_nothing_at_once(scada, delete, cap):
    scada.ways.take_cap = cap
    scada.objects[LAN_01]["points"]["ActivePower"] = {T0 - 1: 0, T0: 0, T0 + 1: 0, T0 + 9: 0,
                                                     T0 + DAY: 0}
    assert delete(dry_run=True)[1][0]["result"]["found"] == 3
    assert delete()[1][0]["result"] == {"found": 3, "deleted": 3}


def test_ids_and_points_are_the_same_in_any_case(scada, delete, conn):
    conn.execute("UPDATE objects SET bazefield_id = lower(bazefield_id)")
    samples = dict(scada.objects[LAN_01]["points"]["ActivePower"])
    for id_spelling, point_spelling in itertools.product(["same", "lower", "upper"], repeat=2):
        scada.ways.id_spelling, scada.ways.point_spelling = id_spelling, point_spelling
        for object_id in (LAN_01, LAN_02):
            scada.objects[object_id]["points"]["ActivePower"] = dict(samples)
        _, steps = delete(["activepower"], ["LAN-01", "LAN-02"])
        assert [s["result"] for s in steps] == [{"found": 144, "deleted": 144}] * 2
        assert (times(scada), times(scada, object_id=LAN_02)) == (OUTSIDE, OUTSIDE)


def test_a_server_to_which_case_matters_is_asked_in_its_own_spelling(plain, delete, monkeypatch):
    plain.objects[LAN_01.lower()] = plain.objects.pop(LAN_01)
    monkeypatch.setattr(plain, "asked", lambda names, known: [n for n in known if n in names])
    assert delete(["ACTIVEPOWER"])[1][0]["result"] == {"found": 144, "deleted": 144}


def test_points_that_differ_in_case_alone_are_not_guessed_between(scada, delete):
    scada.objects[LAN_01]["points"]["activePOWER"] = {T0: 1.0}
    _, steps = delete()
    assert "points that differ in letter case alone: 'ActivePower', 'activePOWER'" \
        in steps[0]["comment"]
    assert scada.calls("delete") == []


SERIES = {"timeSeries": [{"t": T0}]}


@pytest.mark.parametrize(("objects", "comment"), [
    ({LAN_01: {"points": {"ActivePower": [{"error": "no access"}]}}},
     f"read: objects.{LAN_01}.points.ActivePower[0] says of 'ActivePower': no access"),
    ({LAN_02: {"points": {"ActivePower": [SERIES]}}},
     f"read: objects holds '{LAN_02}', not what was asked for"),
    ({"LAN-01": {"points": {"ActivePower": [SERIES]}}}, "read: objects holds 'LAN-01', not what"),
    ({LAN_01: {"points": {"WindSpeed": [SERIES]}}}, "points holds 'WindSpeed', not what"),
    ({LAN_01: {"points": {"ActivePower": [SERIES | {"objectId": LAN_02}]}}}, "was not asked for"),
    ({LAN_01: {"points": {"ActivePower": [SERIES | {"pointName": "X"}]}}}, "is of 'X' of None"),
    ({LAN_01: {"points": {"ActivePower": SERIES}}}, "is an object, not a list"),
    ({LAN_01: {"points": {"ActivePower": [{"timeSeries": [{"v": 1.0}]}]}}},
     "timeSeries[0].t is missing"),
    ({LAN_01: {"points": {"ActivePower": [{"timeSeries": [{"t": "soon"}]}]}}},
     "timeSeries[0].t is 'soon', not a moment"),
    ({LAN_01: {"points": {"ActivePower": [{"timeSeries": [{"t": None}]}]}}},
     "timeSeries[0].t is missing"),
    ({LAN_01: {"points": "none"}}, f"read: objects.{LAN_01}.points is 'none', not an object"),
    (7, "read: objects is 7, not an object"),
])
def test_an_answer_that_cannot_be_attributed_is_named(scada, pauses, monkeypatch, objects,
                                                      comment):
    monkeypatch.setattr(scada, "do_read", lambda r: {"objects": objects})
    end = MIDNIGHT + timedelta(days=1)
    with pytest.raises(bazefield.BazefieldError) as exc:
        list(bazefield.client().sample_times(LAN_01, "ActivePower", MIDNIGHT, end))
    assert comment in str(exc.value)


def test_samples_none_of_which_was_asked_for_are_an_error(plain, delete, monkeypatch):
    samples = plain.samples
    monkeypatch.setattr(plain, "samples", lambda *args: [
        row | {"t": row["t"] // 1000} for row in samples(*args)])
    _, steps = delete()
    assert steps[0]["comment"] == (f"read: of 145 samples none lies between {T0 - 1} and "
                                   f"{T0 + DAY}, as was asked for; the first is at {T0 // 1000}")
    assert plain.calls("delete") == []


def test_samples_at_the_bounds_of_an_empty_window_are_none(plain, delete, monkeypatch):
    monkeypatch.setattr(plain, "samples", lambda *args: [{"t": T0 - DAY}, {"t": T0 + 2 * DAY}])
    assert delete()[1][0]["result"] == {"found": 0, "deleted": 0}


@pytest.mark.parametrize("spelled", [str, float])
def test_a_sample_is_understood_however_it_is_spelled(plain, delete, monkeypatch, spelled):
    points, samples = plain.objects[LAN_01]["points"], plain.samples
    points["t"] = points.pop("ActivePower")
    monkeypatch.setattr(plain, "samples", lambda *args: [
        {"T": spelled(row["t"]), "V": 1} for row in samples(*args)])
    assert delete(["t"])[1][0]["result"] == {"found": 144, "deleted": 144}


@pytest.mark.parametrize("cap", [None, 7])
def test_samples_that_come_newest_first_are_counted_or_refused(plain, delete, monkeypatch, cap):
    samples = plain.samples
    monkeypatch.setattr(plain, "samples", lambda values, r: samples(
        values, r | {"take": None})[::-1][:cap])
    _, steps = delete()
    if cap:
        assert "the samples do not come oldest first" in steps[0]["comment"]
        assert plain.calls("delete") == []
    else:
        assert steps[0]["result"] == {"found": 144, "deleted": 144}


def test_a_dry_run_deletes_nothing(scada, delete):
    before = times(scada)
    _, steps = delete(dry_run=True)
    assert steps[0]["result"] == {"found": 144, "deleted": 0, "dry_run": True}
    assert times(scada) == before
    assert scada.calls("delete") == []


def test_an_empty_window_is_not_deleted_at_all(scada, delete):
    _, steps = delete(start="2027-03-01 00:00:00", end="2027-03-02 00:00:00")
    assert steps[0]["result"] == {"found": 0, "deleted": 0}
    assert scada.calls("delete") == []


def test_a_long_window_is_deleted_in_chunks_of_at_most_30_days(scada, delete):
    scada.ways.take_cap = 5_000
    year = {T0 + n * 60 * MINUTE: 1.0 for n in range(365 * 24)}
    scada.objects[LAN_01]["points"]["ActivePower"] = dict(year)
    _, steps = delete(end="2027-03-01 00:00:00")
    assert steps[0]["result"] == {"found": 8760, "deleted": 8760}
    spans = [int(r["to"]) - int(r["from"]) for r in scada.calls("delete")]
    assert len(spans) == 13
    assert max(spans) < 30 * DAY


def test_reading_goes_page_by_page_even_where_many_samples_share_a_moment(scada, pauses,
                                                                         monkeypatch):
    monkeypatch.setattr(bazefield, "PAGE", 7)
    client = bazefield.client()
    shared = [T0] * 5 + [T0 + 1] * 4 + [T0 + n for n in range(2, 30)]
    monkeypatch.setattr(scada, "do_read", lambda r: {"objects": {LAN_01: {"points": {"P": [{
        "timeSeries": [{"t": t} for t in shared
                       if int(r["from"]) <= t <= int(r["to"])][:r["take"]]}]}}}})
    end = MIDNIGHT + timedelta(seconds=1)
    assert list(client.sample_times(LAN_01, "P", MIDNIGHT, end)) == shared


def test_requests_do_not_grow_with_the_steps(plain, delete):
    """Objects and points are looked up once; a step counts, makes sure, deletes and reads back."""
    delete(["ActivePower", "WindSpeed"], ["LAN-01", "LAN-02"])
    names = [name for name, _ in plain.log]
    assert {n: names.count(n) for n in set(names)} == {
        "find_objects": 1, "points": 1, "read": 3 * 4, "delete": 4}


def test_times_go_out_as_utc_milliseconds(plain, delete, monkeypatch):
    monkeypatch.setenv("PERFDB_TIMEZONE", "Europe/Madrid")
    delete(start="2026-03-01 01:00:00", end="2026-03-01 07:00:00-03:00")
    assert plain.calls("delete") == [{
        "objectids": [LAN_01], "points": ["ActivePower"], "from": str(T0),
        "to": str(T0 + 10 * 60 * MINUTE - 1), "format": "json"}]


def test_an_object_filter_selects_the_objects(scada, delete, run):
    _job, steps = run(baze_tag_delete.JobBazeTagDelete, {
        "object_filter": {"selected": {"parent": ["LAN"]}, "ignored": {"models": ["V90"]}},
        "tags": ["ActivePower"], "start": START, "end": END})
    assert [s["name"] for s in steps] == ["LAN-01 / ActivePower"]


@pytest.mark.parametrize(("call", "comment"), [
    ({"tags": ["ActivPower"]},
     f"'ActivPower' is no point of object {LAN_01}; nearest: 'ActivePower'"),
    ({"objects": ["LAN"]}, "Bazefield has no object named 'LAN'; nearest: 'LAN-0"),
])
def test_an_unknown_name_fails_its_step_with_the_nearest(scada, delete, call, comment):
    _, steps = delete(**call)
    assert comment in steps[0]["comment"]
    assert scada.calls("delete") == []


@pytest.mark.parametrize("way", ["object_names", "object_filter"])
def test_many_unknown_names_are_counted(scada, run, conn, way):
    """And in no more time than it takes to know as many."""
    conn.execute("INSERT INTO objects (object_model_id, name) "
                 "SELECT 2, 'KOR-' || n FROM generate_series(1, 8000) AS n")
    names = [f"KOR-{n}" for n in range(8_000)] + ["x" * 5_000] + [f"LAN {n}" for n in range(8_000)]
    given = {"object_names": names, "object_filter": {"selected": {"instances": names}}}
    begun = time.monotonic()
    job, _ = run(baze_tag_delete.JobBazeTagDelete, {
        way: given[way], "tags": ["ActivePower"], "start": START, "end": END})
    assert ("'KOR-0'" in job["comment"], "and 7992 more" in job["comment"]) == (True, True)
    assert len(job["comment"]) < 1_200
    assert time.monotonic() - begun < 3


def test_two_objects_of_one_name_are_not_guessed_between(scada, delete):
    scada.add_object("1164AFE219C9DFFF", "LAN-02")
    _, steps = delete(objects=["LAN-02"])
    assert "Bazefield has 2 objects named 'LAN-02'" in steps[0]["comment"]


@pytest.mark.parametrize(("parameters", "problem"), [
    ({"tags": []}, "$.tags: [] should be non-empty"),
    ({"tags": [""]}, "$.tags[0]: '' should be non-empty"),
    ({"object_names": []}, "$.object_names: [] should be non-empty"),
    ({"object_filter": {"selected": {}}}, "$: give exactly one of object_names and object_filter"),
    ({"start": END}, "is not after"),
    ({"end": None}, "$.end: None is not of type 'string'"),
    ({"dry_run": "yes"}, "$.dry_run: 'yes' is not of type 'boolean'"),
])
def test_wrong_parameters_of_a_delete(plant, conn, parameters, problem):
    with pytest.raises(jobs.JobRequestError) as exc:
        control.create_job(conn, "Bazefield Tag Delete", {
            "object_names": ["LAN-01"], "tags": ["ActivePower"], "start": START,
            "end": END} | parameters)
    assert problem in str(exc.value)


@pytest.mark.parametrize("body", [
    {}, {"objectIds": [], "points": ["P"], "from": "0", "to": "1"},
    {"objectIds": [LAN_01], "points": [], "from": "0", "to": "1"},
    {"objectIds": [LAN_01], "points": ["P"], "to": "1"},
    {"objectIds": [LAN_01], "points": ["P"], "from": "", "to": "1"},
    {"objectIds": [LAN_01], "points": ["P"], "from": "0", "to": None},
])
def test_a_delete_with_anything_empty_cannot_be_sent(scada, pauses, body):
    with pytest.raises(ValueError, match="delete must never go out without"):
        bazefield.client().call("delete", body=body)
    assert scada.log == []


@pytest.mark.parametrize("args", [
    ("", "P", 0, 1), ("12", "P", 0, 1), (LAN_01, "", 0, 1), (LAN_01, "P", None, 1),
    (LAN_01, "P", 2, 1),
])
def test_a_delete_of_nothing_in_particular_cannot_be_sent(scada, pauses, args):
    with pytest.raises(ValueError, match="refusing to delete"):
        bazefield.client().delete_samples(*args)
    assert scada.log == []


# Faults: the server's data is looked at afterwards.

@pytest.mark.parametrize("operation", ["find_objects", "points", "read", "delete"])
def test_a_passing_fault_of_a_delete_is_cured(scada, delete, monkeypatch, operation):
    monkeypatch.setenv("BAZEFIELD_TIMEOUT", "0.1")
    samples = dict(scada.objects[LAN_02]["points"]["ActivePower"])
    for fault in CURED:
        scada.objects[LAN_02]["points"]["ActivePower"] = dict(samples)
        scada.faults += [(operation, fault)]
        _, steps = delete(objects=["LAN-02"])
        assert steps[0]["result"] == {"found": 144, "deleted": 144}
        scada.advance(100)
        assert times(scada, object_id=LAN_02) == OUTSIDE
        assert scada.faults == []


@pytest.mark.parametrize("operation", ["points", "read", "delete"])
def test_a_lasting_fault_of_a_delete_fails_the_step_and_says_so(scada, delete, operation):
    before = times(scada)
    for fault, text in FATAL.items():
        scada.faults += [(operation, fault)]
        job, steps = delete()
        assert steps[0]["comment"].startswith(f"{operation}: ")
        assert text in steps[0]["comment"]
        assert "k3y" not in json.dumps([job, steps], default=str)
    assert times(scada) == before


@pytest.mark.parametrize("fault", ["cut before", "503"])
def test_a_server_that_stays_away_is_given_up(scada, delete, pauses, fault):
    scada.faults += [("read", fault)] * 6  # one may meet a kept connection, which does not count
    _, steps = delete()
    assert "5 tries" in steps[0]["comment"]
    assert len(pauses) == 4
    assert max(pauses) <= bazefield_http.LONGEST_WAIT_SECONDS


def test_retry_after_is_honoured(scada, delete, pauses):
    scada.faults += [("read", "429")]
    delete()
    assert pauses[0] == 7.0


def test_a_right_that_is_refused_in_silence_is_named(scada, delete):
    scada.ways.refuses_silently = True
    _, steps = delete()
    assert ("144 of 144 samples are still there, the first at 2026-03-01 00:00:00Z, though "
            "Bazefield reported no error: may the key's user write the data of this tag?"
            ) in steps[0]["comment"]


def test_samples_that_somebody_writes_meanwhile_fail_the_step(scada, delete):
    scada.after["delete"] = lambda r: scada.later(
        2, lambda: scada.objects[LAN_01]["points"]["ActivePower"].update({T0 + 7: 1.0}))
    scada.ways.late = {"delete": 3.0}
    _, steps = delete()
    assert steps[0]["state"] == "Finished"  # written before the delete was carried out
    scada.ways.late, scada.after["delete"] = {}, lambda r: (
        scada.objects[LAN_01]["points"]["ActivePower"].update({T0 + 7: 1.0}))
    scada.objects[LAN_01]["points"]["ActivePower"] |= {T0 + 8: 1.0, T0 + 9: 1.0}
    _, steps = delete()
    assert "1 of 2 samples are still there, the first at 2026-03-01 00:00:00.007Z; is somebody " \
        "writing to this tag?" in steps[0]["comment"]


def test_a_key_that_may_only_read_deletes_nothing(scada, delete, monkeypatch):
    monkeypatch.setenv("BAZEFIELD_API_KEY", "k3y-read")
    _, steps = delete()
    assert ("delete: status 403: Forbidden: no write access to the data; the key's user lacks "
            "the right") in steps[0]["comment"]
