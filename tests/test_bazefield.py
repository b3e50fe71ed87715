"""Looking objects and points up in Bazefield, how it spells things, `--check`, real handlers."""

import subprocess
import sys
from pathlib import Path

import pytest
from bazefield_fixtures import END, LAN_01, LAN_02, OUTSIDE, START, T0, WANTED, times

import bazefield
import bazefield_answer
import bazefield_settings
import control
import jobs

ROOT = Path(__file__).parents[1]


def check(scada, **env):
    return subprocess.run(
        [sys.executable, str(ROOT / "bazefield.py"), "--check"], capture_output=True, text=True,
        env={"BAZEFIELD_URL": scada.url, "BAZEFIELD_API_KEY": "k3y-read", "PATH": ""} | env)


def test_check_says_which_operations_exist(scada):
    done = check(scada)
    assert done.returncode == 1
    assert "yes  delete " in done.stdout
    assert "NO   insert_allocation " in done.stdout
    scada.metadata += [o.metadata for o in bazefield_settings.OPERATIONS.values()]
    assert check(scada).returncode == 0
    done = check(scada, BAZEFIELD_API_KEY="wrong")
    assert done.returncode == 3
    assert "status 401" in done.stderr


def test_the_handler_runs_both(scada, plant, conn, run_handler):
    scada.ways.late = {}  # the handler really sleeps
    control.create_job(conn, "Bazefield Tag Delete", {
        "object_names": ["LAN-01"], "tags": ["ActivePower"], "start": START, "end": END})
    control.create_job(conn, "Bazefield Insert Allocation", {
        "object_filter": {"selected": {"parent": ["LAN"]}}, "start": START, "end": END,
        "allocation_category": "Night", "allocation_type": "Internal"})
    run_handler("--once", "--workers", "2")
    assert times(scada) == OUTSIDE
    assert scada.standing(LAN_02) == [WANTED]


# Names, ids, moments.

def test_names_are_asked_for_as_the_server_wants_them_and_in_pieces(scada, pauses):
    names = ['East PV Array, Solaredge', 'a"b', "[1]", "{x}", "plain", "Ünï", "a b+c&d=e"]
    names += [f"{n:03} {'long name, ' * 4}" for n in range(60)]
    for n, name in enumerate(names):
        scada.add_object(f"1164AFE219C9E{n:03X}", name)
    found = bazefield.client().find_objects([*names, "nobody", "x" * 2_000])
    assert {name: len(ids) for name, ids in found.items()} == dict.fromkeys(names, 1)
    assert len(scada.calls("find_objects")) == 3


def test_names_differ_in_letter_case_only_if_none_is_the_same(scada, monkeypatch, pauses):
    monkeypatch.setattr(scada, "do_find_objects", lambda r: [
        {"objectId": LAN_01, "attributes": {"ShortName": "lan-01"}},
        {"objectId": LAN_01.lower(), "attributes": {"shortName": "lan-01"}},
        {"objectId": LAN_02, "attributes": {"shortName": "KOR-1"}},
        {"objectId": int(LAN_01, 16), "attributes": {"shortName": "kor-1"}}])
    assert bazefield.client().find_objects(["LAN-01", "KOR-1", "Kor-1"]) == {
        "LAN-01": [LAN_01.lower()], "KOR-1": [LAN_02], "Kor-1": [LAN_02, LAN_01]}


@pytest.mark.parametrize(("entry", "problem"), [
    ({"attributes": {"shortName": "LAN-01"}}, r"find_objects: \[0\].objectId is None, no object"),
    ({"objectId": "LAN", "attributes": {"shortName": "X"}}, r"\[0\].objectId is 'LAN', no object"),
    ({"objectId": LAN_01}, r"find_objects: \[0\].attributes.shortName is missing"),
    (7, r"find_objects: \[0\] is 7, not an object"),
])
def test_an_object_that_cannot_be_told_is_an_error(scada, monkeypatch, pauses, entry, problem):
    monkeypatch.setattr(scada, "do_find_objects", lambda r: [entry])
    with pytest.raises(bazefield.BazefieldError, match=problem):
        bazefield.client().find_objects(["LAN-01"])


def test_an_object_that_is_gone_or_has_no_proper_id_is_named(scada, pauses):
    """The tables may be views of one's own, and a retry comes when it comes."""
    lookup = bazefield.Lookup(bazefield.client(), [(1, "LAN-01", LAN_01), (2, "X", "LAN")])
    with pytest.raises(jobs.JobStepError, match="deleted after the job was created"):
        lookup.bazefield_id(7)
    with pytest.raises(jobs.JobStepError, match="bazefield_id of 'X' is 'LAN'; write 16 hex digi"):
        lookup.bazefield_id(2)
    assert lookup.point(LAN_01, "ActivePower") == (LAN_01, "ActivePower")
    assert scada.calls("points")[0]["objectids"] == [LAN_01]


@pytest.mark.parametrize(("value", "ms"), [
    ("2026-03-01T00:00:00", T0), ("2026-03-01T00:00:00.0000000", T0),
    ("2026-03-01T00:00:00.1239999Z", T0 + 123), ("2026-03-01T01:00:00+01:00", T0),
    ("2026-03-01", T0), (f"/Date({T0})/", T0), (f"/Date({T0}+0100)/", T0), (T0, T0),
    (float(T0), T0), (str(T0), T0), (None, None), ("", None), ("0001-01-01T00:00:00", None),
    ("9999-12-31T23:59:59.9999999", None), ("/Date(-62135596800000)/", None),
    ("/Date(253402300799999)/", None),
])
def test_moments_are_understood_however_they_are_spelled(value, ms):
    assert bazefield_answer.moment_ms(value) == ms


@pytest.mark.parametrize("value", ["soon", "2026", True, T0 // 1000, T0 / 1000, 0, [], {},
                                   float("nan"), float("inf"), 10**30, "/Date(x)/",
                                   "2026-02-30T00:00:00"])
def test_what_is_no_moment_is_said(value):
    with pytest.raises(bazefield.BazefieldError, match=r"op: x is .*, not a moment"):
        bazefield_answer.Answer("op", {"x": value})["x"].moment()


@pytest.mark.parametrize(("again", "understood"), [
    (f'"{LAN_01}": {{"points": {{}}}}', False),
    (f'"{LAN_01}": {{"points": {{"P": [{{"timeSeries": [{{"t": {T0}}}]}}]}}}}', True)])
def test_what_is_there_twice_is_understood_if_it_is_the_same(scada, monkeypatch, pauses, again,
                                                             understood):
    monkeypatch.setattr(scada, "do_read", lambda r: (
        f'{{"objects": {{"{LAN_01}": {{"points": {{"P": [{{"timeSeries": [{{"t": {T0}}}]}}]}}}},'
        f'{again}}}}}'))
    if understood:
        assert bazefield.client()._times(LAN_01, "P", "0", "1") == [T0]
    else:
        with pytest.raises(bazefield.BazefieldError, match=f"'{LAN_01}' is there twice in one"):
            bazefield.client()._times(LAN_01, "P", "0", "1")


@pytest.mark.parametrize("way", [
    "no data", "No data found.", "No values available", "No data for the period 1 to 2",
])
def test_that_there_is_no_data_is_no_error(way):
    assert bazefield_answer.error_inside({"replyInfo": {"error": way}}) == ""


@pytest.mark.parametrize("answer", [
    {"replyInfo": {"error": "No data access"}}, {"ReplyInfo": {"Error": "x"}},
    {"responseStatus": {"message": "x"}}, {"responseStatus": "x"}, {"replyInfo": "x"},
    {"ResponseStatus": {"ErrorCode": "x"}}, {"responseStatus": {"errors": [{"message": "x"}]}},
])
def test_an_error_is_found_wherever_it_stands(answer):
    assert bazefield_answer.error_inside(answer)
