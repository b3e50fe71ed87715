"""The Bazefield jobs against the stand-in: whatever goes wrong, nothing too much and nothing twice."""

import contextlib
import json
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
from fake_bazefield import FakeBazefield
from park import MIDNIGHT

import baze_insert_alloc
import baze_tag_delete
import bazefield
import bazefield_http
import control
import jobs
from worker import Worker, use_worker

ROOT = Path(__file__).parents[1]
LAN_01, LAN_02 = "1164AFE219C9D000", "1164AFE219C9D001"
T0 = bazefield.to_ms(MIDNIGHT)
MINUTE, DAY = 60_000, 86_400_000
START, END = "2026-03-01 00:00:00", "2026-03-02 00:00:00"


@pytest.fixture
def scada(monkeypatch):
    with FakeBazefield() as scada:
        monkeypatch.setenv("BAZEFIELD_URL", scada.url)
        monkeypatch.setenv("BAZEFIELD_API_KEY", "k3y-write")
        samples = {T0 + n * 10 * MINUTE: float(n) for n in range(-6, 151)}
        scada.add_object(LAN_01, "LAN-01", {"ActivePower": dict(samples), "WindSpeed": dict(samples)})
        scada.add_object(LAN_02, "LAN-02", {"ActivePower": dict(samples), "WindSpeed": dict(samples)})
        yield scada


@pytest.fixture
def pauses(monkeypatch):
    """The client's pauses, noted instead of slept."""
    pauses = []
    bazefield._client.clear()
    monkeypatch.setattr(bazefield_http.time, "sleep", pauses.append)
    monkeypatch.setattr(bazefield_http.Client.__init__, "__defaults__", (pauses.append,))
    yield pauses
    bazefield._client.clear()


@pytest.fixture
def plant(conn, pauses):
    """Two turbines below a park; LAN-02 is looked up by name."""
    conn.execute("INSERT INTO object_types (name) VALUES ('wind_farm'), ('wind_turbine')")
    conn.execute("INSERT INTO object_models (object_type_id, name) VALUES (1, 'park'), (2, 'G97'), (2, 'V90')")
    conn.execute("INSERT INTO objects (object_model_id, name, parent_id, bazefield_id) VALUES "
                 "(1, 'LAN', NULL, NULL), (2, 'LAN-01', 1, %s), (3, 'LAN-02', 1, NULL)", [LAN_01])
    control.write_types(conn, ["Bazefield Tag Delete", "Bazefield Insert Allocation"])


@pytest.fixture
def run(conn, dsn, plant):
    """Run a job in this process; return (job, its steps)."""
    worker = Worker(dsn)
    use_worker(worker)

    def run(cls, parameters):
        job_id = control.create_job(conn, cls._name, parameters)
        with contextlib.suppress(jobs.JobRequestError):
            cls(job_id).run()
        job = conn.execute("SELECT * FROM job_instances WHERE id = %s", [job_id]).fetchone()
        steps = conn.execute("SELECT * FROM job_steps WHERE job_instance_id = %s ORDER BY position", [job_id])
        return job, steps.fetchall()
    yield run
    use_worker(None)
    worker.close()


@pytest.fixture
def delete(run):
    def delete(tags=("ActivePower",), objects=("LAN-01",), **more):
        return run(baze_tag_delete.JobBazeTagDelete, {
            "object_names": list(objects), "tags": list(tags), "start": START, "end": END} | more)
    return delete


@pytest.fixture
def insert(run):
    def insert(objects=("LAN-01",), **more):
        return run(baze_insert_alloc.JobBazeInsertAlloc, {
            "object_filter": {"selected": {"instances": list(objects)}}, "start": START, "end": END,
            "allocation_category": "Night", "allocation_type": "Internal"} | more)
    return insert


def times(scada, point="ActivePower", object_id=LAN_01):
    return sorted(scada.objects[object_id]["points"][point])


OUTSIDE = [T0 + n * 10 * MINUTE for n in [*range(-6, 0), *range(144, 151)]]  # the sample at END stays


# Tag delete.

@pytest.mark.parametrize("inclusive", [True, False])
def test_the_window_is_deleted_and_nothing_else(scada, delete, inclusive):
    scada.to_is_inclusive = inclusive
    before = times(scada, "WindSpeed"), times(scada, object_id=LAN_02)
    job, steps = delete()
    assert (job["state"], steps[0]["name"]) == ("Finished", "LAN-01 / ActivePower")
    assert steps[0]["result"] == {"found": 144, "deleted": 144}
    assert times(scada) == OUTSIDE
    assert (times(scada, "WindSpeed"), times(scada, object_id=LAN_02)) == before


@pytest.mark.parametrize("inclusive", [True, False])
def test_a_sample_in_the_last_millisecond_goes_and_the_one_at_the_end_stays(scada, delete, inclusive):
    scada.to_is_inclusive = inclusive
    scada.objects[LAN_01]["points"]["ActivePower"] |= {T0 + DAY - 1: 1.0}
    assert delete()[1][0]["result"] == {"found": 145, "deleted": 145}
    assert times(scada) == OUTSIDE


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
    year = {T0 + n * 60 * MINUTE: 1.0 for n in range(365 * 24)}
    scada.objects[LAN_01]["points"]["ActivePower"] = dict(year)
    _, steps = delete(end="2027-03-01 00:00:00")
    assert steps[0]["result"] == {"found": 8760, "deleted": 8760}
    spans = [int(r["to"]) - int(r["from"]) for r in scada.calls("delete")]
    assert len(spans) == 13
    assert max(spans) < 30 * DAY


def test_reading_goes_page_by_page_even_where_many_samples_share_a_moment(scada, pauses, monkeypatch):
    monkeypatch.setattr(bazefield, "PAGE", 7)
    client = bazefield.client()
    shared = [T0] * 5 + [T0 + 1] * 4 + [T0 + n for n in range(2, 30)]
    monkeypatch.setattr(scada, "do_read", lambda r: {"objects": {LAN_01: {"points": {"P": [{"timeSeries": [
        {"t": t} for t in shared if int(r["from"]) <= t <= int(r["to"])][:r["take"]]}]}}}})
    assert list(client.sample_times(LAN_01, "P", MIDNIGHT, MIDNIGHT + timedelta(seconds=1))) == shared


def test_requests_do_not_grow_with_the_steps(scada, delete):
    """Objects and points are looked up once; a step counts, deletes and reads back."""
    delete(["ActivePower", "WindSpeed"], ["LAN-01", "LAN-02"])
    names = [name for name, _ in scada.log]
    assert {n: names.count(n) for n in set(names)} == {
        "find_objects": 1, "points": 1, "read": 8, "delete": 4}
    assert len(scada.log) <= 4 * 4 + 2


def test_times_go_out_as_utc_milliseconds(scada, delete, monkeypatch):
    monkeypatch.setenv("PERFDB_TIMEZONE", "Europe/Madrid")
    delete(start="2026-03-01 01:00:00", end="2026-03-01 07:00:00-03:00")
    assert scada.calls("delete") == [{"objectids": [LAN_01], "points": ["ActivePower"], "from": str(T0),
                                       "to": str(T0 + 10 * 60 * MINUTE - 1), "format": "json"}]


def test_an_object_filter_selects_the_objects(scada, delete, run):
    _job, steps = run(baze_tag_delete.JobBazeTagDelete, {
        "object_filter": {"selected": {"parent": ["LAN"]}, "ignored": {"models": ["V90"]}},
        "tags": ["ActivePower"], "start": START, "end": END})
    assert [s["name"] for s in steps] == ["LAN-01 / ActivePower"]


@pytest.mark.parametrize(("call", "comment"), [
    ({"tags": ["ActivPower"]}, f"'ActivPower' is no point of object {LAN_01}; nearest: 'ActivePower'"),
    ({"objects": ["LAN"]}, "Bazefield has no object named 'LAN'; nearest: 'LAN-0"),
])
def test_an_unknown_name_fails_its_step_with_the_nearest(scada, delete, call, comment):
    _, steps = delete(**call)
    assert comment in steps[0]["comment"]
    assert scada.calls("delete") == []


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
            "object_names": ["LAN-01"], "tags": ["ActivePower"], "start": START, "end": END} | parameters)
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
    ("", "P", 0, 1), ("12", "P", 0, 1), (LAN_01, "", 0, 1), (LAN_01, "P", None, 1), (LAN_01, "P", 2, 1),
])
def test_a_delete_of_nothing_in_particular_cannot_be_sent(scada, pauses, args):
    with pytest.raises(ValueError, match="refusing to delete"):
        bazefield.client().delete_samples(*args)
    assert scada.log == []


# Faults: each is met by both jobs, and the server's data is looked at afterwards.

CURED = ["cut before", "cut after", "429", "503", "short", "never"]
FATAL = {"401": "status 401: Unauthorized: key *** has expired; check the API key",
         "403": "status 403: Forbidden: no write access",
         "500": "status 500: Error: SerializationException",
         "html": "status 200, but no JSON: Log in, ***",
         "reply error": "status 200, but point is read only",
         "response status": "status 200, but Locked: range is archived",
         "redirect": "redirected to 'elsewhere.example', which is not followed"}


@pytest.mark.parametrize("operation", ["find_objects", "points", "read", "delete"])
@pytest.mark.parametrize("fault", CURED)
def test_a_passing_fault_of_a_delete_is_cured(scada, delete, monkeypatch, operation, fault):
    monkeypatch.setenv("BAZEFIELD_TIMEOUT", "0.2")
    scada.faults += [(operation, fault)]
    _, steps = delete(objects=["LAN-02"])
    assert steps[0]["result"] == {"found": 144, "deleted": 144}
    assert times(scada, object_id=LAN_02) == OUTSIDE
    assert scada.faults == []


@pytest.mark.parametrize("operation", ["points", "read", "delete"])
@pytest.mark.parametrize("fault", FATAL)
def test_a_lasting_fault_of_a_delete_fails_the_step_and_says_so(scada, delete, operation, fault):
    before = times(scada)
    scada.faults += [(operation, fault)]
    job, steps = delete()
    assert steps[0]["comment"] == f"{operation}: {FATAL[fault]}" or FATAL[fault] in steps[0]["comment"]
    assert "k3y" not in json.dumps([job, steps], default=str)
    assert times(scada) == before


@pytest.mark.parametrize("fault", ["cut before", "503"])
def test_a_server_that_stays_away_is_given_up(scada, delete, pauses, fault):
    scada.faults += [("read", fault)] * 5
    _, steps = delete()
    assert "5 tries" in steps[0]["comment"]
    assert len(pauses) == 4
    assert max(pauses) <= bazefield_http.LONGEST_WAIT_SECONDS


def test_retry_after_is_honoured(scada, delete, pauses):
    scada.faults += [("read", "429")]
    delete()
    assert pauses == [7.0]


def test_samples_that_come_back_fail_the_step(scada, delete, monkeypatch):
    monkeypatch.setattr(scada, "do_delete", lambda r: {"replyInfo": {}})
    _, steps = delete()
    assert "144 of 144 samples are still there, the first at 2026-03-01 00:00:00Z" in steps[0]["comment"]


def test_a_key_that_may_only_read_deletes_nothing(scada, delete, monkeypatch):
    monkeypatch.setenv("BAZEFIELD_API_KEY", "k3y-read")
    _, steps = delete()
    assert "delete: status 403: Forbidden: no write access to the data; the key's user lacks the right" \
        in steps[0]["comment"]


# Insert allocation.

WANTED = (10, T0, T0 + DAY)


def test_an_allocation_is_inserted_for_each_object(scada, insert):
    _, steps = insert(["LAN-02", "LAN-01"])
    assert [s["name"] for s in steps] == ["LAN-01", "LAN-02"]
    assert steps[0]["result"] == {"inserted": [71], "standing": [], "replaced": [], "skipped": []}
    assert (scada.standing(LAN_01), scada.standing(LAN_02)) == ([WANTED], [WANTED])


def test_inserting_again_inserts_nothing(scada, insert):
    insert()
    _, steps = insert()
    assert steps[0]["result"] == {"inserted": [], "standing": [71], "replaced": [], "skipped": []}
    assert scada.standing(LAN_01) == [WANTED]


def test_a_child_goes_to_the_linked_sub_type_under_the_main_category(scada, insert):
    _, steps = insert(child_category="Grid")
    assert steps[0]["result"]["inserted"] == [71, 72]
    assert scada.standing(LAN_01) == [WANTED, (20, T0, T0 + DAY)]


def test_a_category_means_something_within_its_type_only(scada, insert):
    insert(allocation_type="IEC")
    assert scada.standing(LAN_01) == [(30, T0, T0 + DAY)]


@pytest.mark.parametrize(("change", "comment"), [
    ({"allocation_type": "Internl"}, "allocation type named 'Internl'; nearest: 'Internal'"),
    ({"allocation_category": "Nigth"}, "category of 'Internal' named 'Nigth'; nearest: 'Night'"),
    ({"allocation_type": "IEC", "child_category": "Grid"}, "needs one sub-type linked to 'IEC'; Bazefield has 0"),
])
def test_unknown_type_or_category_fails_the_step(scada, insert, change, comment):
    _, steps = insert(**change)
    assert comment in steps[0]["comment"]
    assert scada.allocations == {}


HOUR = 60 * MINUTE


@pytest.mark.parametrize("end", [T0 + 2 * HOUR, None])
def test_on_overlap_fail_names_what_stands_there(scada, insert, end):
    scada.add_allocation(LAN_01, 11, T0 - HOUR, end)
    _, steps = insert()
    assert "Other allocations stand in the window, nothing was inserted: 71 ('Service', 2026-02-28 23:00:00Z to" \
        in steps[0]["comment"]
    assert len(scada.allocations) == 1


def test_on_overlap_skip_leaves_the_object_as_it_is(scada, insert):
    scada.add_allocation(LAN_01, 11, T0 - HOUR, T0 + HOUR)
    _, steps = insert(["LAN-01", "LAN-02"], on_overlap="skip")
    assert [s["result"]["skipped"] for s in steps] == [[71], []]
    assert scada.standing(LAN_01) == [(11, T0 - HOUR, T0 + HOUR)]
    assert scada.standing(LAN_02) == [WANTED]


def test_on_overlap_replace_keeps_what_lies_outside(scada, insert):
    scada.add_allocation(LAN_01, 11, T0 - HOUR, T0 + HOUR)
    scada.add_allocation(LAN_01, 11, T0 + 2 * HOUR, T0 + 3 * HOUR)
    scada.add_allocation(LAN_01, 11, T0 + DAY - HOUR, T0 + DAY + HOUR)
    scada.add_allocation(LAN_01, 30, T0, T0 + HOUR)  # of another type: not our business
    scada.add_allocation(LAN_02, 11, T0, T0 + HOUR)
    _, steps = insert(on_overlap="replace")
    assert steps[0]["result"]["replaced"] == [71, 72, 73]
    assert scada.standing(LAN_01) == sorted([
        WANTED, (11, T0 - HOUR, T0), (11, T0 + DAY, T0 + DAY + HOUR), (30, T0, T0 + HOUR)])
    assert scada.standing(LAN_02) == [(11, T0, T0 + HOUR)]


@pytest.mark.parametrize("columns", [{"manual": False}, {"approved": True}, {"holdCategory": True}, {"end": None}])
def test_only_ended_manual_allocations_are_replaced(scada, insert, columns):
    scada.add_allocation(LAN_01, 11, T0, T0 + HOUR)
    scada.add_allocation(LAN_01, 11, T0 + HOUR, **{"end": T0 + 2 * HOUR} | columns)
    _, steps = insert(on_overlap="replace")
    assert "nothing was changed: 72 ('Service'" in steps[0]["comment"]
    assert len(scada.allocations) == 2


@pytest.mark.parametrize("operation", ["allocation_types", "allocation_categories", "find_objects", "allocations",
                                       "insert_allocation", "delete_allocation"])
@pytest.mark.parametrize("fault", CURED)
def test_a_passing_fault_of_an_insert_is_cured_and_nothing_comes_twice(scada, insert, monkeypatch, operation, fault):
    monkeypatch.setenv("BAZEFIELD_TIMEOUT", "0.2")
    scada.add_allocation(LAN_02, 11, T0 - HOUR, T0 + HOUR)
    scada.faults += [(operation, fault)]
    _, steps = insert(["LAN-02"], on_overlap="replace")
    if steps[0]["state"] == "Failed":  # a deletion of which nothing is known is left to a retry
        assert (operation, fault in ("cut before", "503")) == ("delete_allocation", True)
        assert insert(["LAN-02"], on_overlap="replace")[1][0]["state"] == "Finished"
    assert scada.standing(LAN_02) == [WANTED, (11, T0 - HOUR, T0)]
    assert scada.faults == []


@pytest.mark.parametrize("operation", ["allocations", "insert_allocation"])
@pytest.mark.parametrize("fault", FATAL)
def test_a_lasting_fault_of_an_insert_fails_the_step_and_says_so(scada, insert, operation, fault):
    scada.faults += [(operation, fault)]
    job, steps = insert()
    assert steps[0]["comment"].startswith(f"{operation}: ")
    assert FATAL[fault] in steps[0]["comment"]
    assert "k3y" not in json.dumps([job, steps], default=str)
    assert scada.allocations == {}


def test_an_insert_the_server_does_not_understand_is_noticed(scada, insert, monkeypatch, tmp_path):
    (tmp_path / "operations.json").write_text('{"insert_allocation": {"fields": {"categoryId": "category"}}}')
    monkeypatch.setenv("BAZEFIELD_OPERATIONS", str(tmp_path / "operations.json"))
    _, steps = insert()
    assert "Bazefield accepted the allocation, but it is not there" in steps[0]["comment"]


@pytest.mark.parametrize(("object_filter", "comment"), [
    ({"selected": {}}, "object_filter.selected is empty"),
    ({"selected": {"instances": ["LAN-01", "X"], "types": ["Y"], "parent": ["Z"]}, "ignored": {"models": ["W"]}},
     "ignored.models 'W', selected.instances 'X', selected.parent 'Z', selected.types 'Y'"),
    ({"selected": {"instances": ["LAN-01"]}, "ignored": {"models": ["G97"]}}, "nothing is left"),
    ({"selected": {"parent": ["LAN-01"]}}, "selected.parent 'LAN-01'"),  # nothing below a turbine
])
def test_a_filter_that_selects_nothing_fails_the_job(scada, insert, object_filter, comment):
    job, steps = insert(object_filter=object_filter)
    assert (job["state"], steps) == ("Failed", [])
    assert comment in job["comment"]


@pytest.mark.parametrize(("object_filter", "names"), [
    ({"selected": {"parent": ["LAN"]}}, ["LAN-01", "LAN-02"]),
    ({"selected": {"types": ["wind_turbine"]}, "ignored": {"instances": ["LAN-01"]}}, ["LAN-02"]),
    ({"selected": {"models": ["G97"], "instances": ["LAN-02"]}}, ["LAN-01", "LAN-02"]),
    ({"selected": {"types": ["wind_turbine"]}, "ignored": {"parent": []}}, ["LAN-01", "LAN-02"]),
])
def test_a_filter_is_a_union_less_a_union(scada, insert, object_filter, names):
    _, steps = insert(object_filter=object_filter)
    assert [s["name"] for s in steps] == names


# Settings, TLS, the command.

@pytest.mark.parametrize(("env", "problem"), [
    ({}, "BAZEFIELD_URL=''"),
    ({"BAZEFIELD_URL": "http://scada.example"}, "plain http is taken for localhost only"),
    ({"BAZEFIELD_URL": "https://u:p4ss@scada.example"}, "must not hold a user or password"),
    ({"BAZEFIELD_URL": "https://scada.example:x"}, "write https://HOST"),
    ({"BAZEFIELD_API_KEY": "a\nX-Evil: 1"}, "characters a header cannot carry"),
    ({"BAZEFIELD_API_KEY": "", "BAZEFIELD_API_KEY_FILE": "/no/such/file"}, "BAZEFIELD_API_KEY_FILE='/no/such/file'"),
    ({"BAZEFIELD_TIMEOUT": "soon"}, "BAZEFIELD_TIMEOUT='soon'"),
    ({"BAZEFIELD_CA_BUNDLE": "/no/such/file"}, "BAZEFIELD_CA_BUNDLE='/no/such/file' is no file"),
    ({"BAZEFIELD_OPERATIONS": "/no/such/file"}, "BAZEFIELD_OPERATIONS='/no/such/file'"),
])
def test_wrong_settings_are_all_named(env, problem):
    with pytest.raises(bazefield.BazefieldError) as exc:
        bazefield.read_settings({"BAZEFIELD_URL": "", "BAZEFIELD_API_KEY": "k"} | env)
    assert problem in str(exc.value)
    assert "p4ss" not in str(exc.value)
    assert "Evil" not in str(exc.value)


def test_missing_settings_fail_the_job_before_any_step(delete, monkeypatch):
    job, steps = delete()
    assert (job["state"], steps) == ("Failed", [])
    assert "BAZEFIELD_URL" in job["comment"]
    assert "BAZEFIELD_API_KEY" in job["comment"]


def test_the_key_comes_from_a_file_too(scada, delete, monkeypatch, tmp_path):
    (tmp_path / "key").write_text("k3y-write\n")
    monkeypatch.delenv("BAZEFIELD_API_KEY")
    monkeypatch.setenv("BAZEFIELD_API_KEY_FILE", str(tmp_path / "key"))
    assert delete()[0]["state"] == "Finished"


def test_the_key_does_not_show(scada):
    assert "k3y" not in repr(bazefield.read_settings())


@pytest.fixture
def certificate(tmp_path):
    files = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    try:
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1", "-subj",
                        "/CN=localhost", "-addext", "subjectAltName=DNS:localhost", "-out", files[0],
                        "-keyout", files[1]], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl here to make a certificate with")
    return files


def test_tls_is_verified(certificate, monkeypatch, pauses):
    with FakeBazefield(certificate) as scada:
        scada.add_object(LAN_01, "LAN-01")
        monkeypatch.setenv("BAZEFIELD_URL", scada.url)
        monkeypatch.setenv("BAZEFIELD_API_KEY", "k3y-write")
        with pytest.raises(bazefield.BazefieldError, match=r"not trusted.*BAZEFIELD_CA_BUNDLE"):
            bazefield.client().all_names()
        assert scada.log == []
        monkeypatch.setenv("BAZEFIELD_CA_BUNDLE", certificate[0])
        assert bazefield.client().all_names() == ["LAN-01"]


def test_one_connection_is_kept(scada, pauses, monkeypatch):
    accepted = []
    get_request = scada.get_request
    monkeypatch.setattr(scada, "get_request", lambda: accepted.append(1) or get_request())
    for _ in range(5):
        bazefield.client().all_names()
    assert len(accepted) == 1


def check(scada, **env):
    return subprocess.run([sys.executable, str(ROOT / "bazefield.py"), "--check"], capture_output=True, text=True,
                          env={"BAZEFIELD_URL": scada.url, "BAZEFIELD_API_KEY": "k3y-read", "PATH": ""} | env)


def test_check_says_which_operations_exist(scada):
    done = check(scada)
    assert done.returncode == 1
    assert "yes  delete " in done.stdout
    assert "NO   insert_allocation " in done.stdout
    scada.metadata += [o.metadata for o in bazefield_http.OPERATIONS.values()]
    assert check(scada).returncode == 0
    done = check(scada, BAZEFIELD_API_KEY="wrong")
    assert done.returncode == 3
    assert "status 401" in done.stderr


def test_the_handler_runs_both(scada, plant, conn, run_handler):
    control.create_job(conn, "Bazefield Tag Delete", {
        "object_names": ["LAN-01"], "tags": ["ActivePower"], "start": START, "end": END})
    control.create_job(conn, "Bazefield Insert Allocation", {
        "object_filter": {"selected": {"parent": ["LAN"]}}, "start": START, "end": END,
        "allocation_category": "Night", "allocation_type": "Internal"})
    run_handler("--once", "--workers", "2")
    assert times(scada) == OUTSIDE
    assert scada.standing(LAN_02) == [WANTED]
