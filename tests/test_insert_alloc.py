"""Bazefield Insert Allocation against the stand-in: what stands, overlaps, is replaced."""

import json

import pytest
from bazefield_fixtures import CURED, DAY, FATAL, HOUR, LAN_01, LAN_02, T0, WANTED

import bazefield_answer


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
    ({"allocation_type": "IEC", "child_category": "Grid"},
     "needs one sub-type linked to 'IEC'; Bazefield has 0"),
])
def test_unknown_type_or_category_fails_the_step(scada, insert, change, comment):
    _, steps = insert(**change)
    assert comment in steps[0]["comment"]
    assert scada.allocations == {}


@pytest.mark.parametrize(("given", "problem"), [("1", "is '1', not a who"), (None, "is missing")])
def test_a_category_of_which_nobody_knows_the_type_is_named(scada, insert, given, problem):
    scada.categories[0]["typeId"] = given
    _, steps = insert()
    assert steps[0]["comment"].startswith(f"allocation_categories: [0].typeId {problem}")


@pytest.mark.parametrize("end", [T0 + 2 * HOUR, None])
def test_on_overlap_fail_names_what_stands_there(scada, insert, end):
    scada.ways.cuts = False
    scada.add_allocation(LAN_01, 11, T0 - HOUR, end)
    _, steps = insert()
    assert ("Other allocations stand in the window, nothing was inserted: 71 ('Service', "
            "2026-02-28 23:00:00Z to") in steps[0]["comment"]
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
    assert sorted(steps[0]["result"]["replaced"]) == [71, 72, 73]
    assert scada.standing(LAN_01) == sorted([
        WANTED, (11, T0 - HOUR, T0), (11, T0 + DAY, T0 + DAY + HOUR), (30, T0, T0 + HOUR)])
    assert scada.standing(LAN_02) == [(11, T0, T0 + HOUR)]


@pytest.mark.parametrize("columns", [{"manual": False}, {"approved": True}, {"end": None},
                                     {"holdCategory": True}, {"finished": False}])
def test_only_ended_manual_allocations_are_replaced(scada, insert, columns):
    scada.ways.flags = True
    scada.add_allocation(LAN_01, 11, T0, T0 + HOUR)
    scada.add_allocation(LAN_01, 11, T0 + HOUR, **{"end": T0 + 2 * HOUR} | columns)
    _, steps = insert(on_overlap="replace")
    assert "nothing was changed: 72 ('Service'" in steps[0]["comment"]
    assert len(scada.allocations) == 2


OPERATIONS = ["allocation_types", "allocation_categories", "find_objects", "allocations",
              "allocation", "insert_allocation", "delete_allocation"]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_passing_fault_of_an_insert_is_cured_and_nothing_comes_twice(scada, insert, monkeypatch,
                                                                       operation):
    monkeypatch.setenv("BAZEFIELD_TIMEOUT", "0.1")
    for fault in CURED:
        scada.allocations.clear()
        scada.add_allocation(LAN_02, 11, T0 - HOUR, T0 + HOUR)
        scada.faults += [(operation, fault)]
        _, steps = insert(["LAN-02"], on_overlap="replace")
        if steps[0]["state"] == "Failed":  # a write of which nothing is known is left to a retry
            assert operation in ("insert_allocation", "delete_allocation")
            assert fault in ("cut before", "408", "503")
            assert insert(["LAN-02"], on_overlap="replace")[1][0]["state"] == "Finished"
        scada.advance(100)
        assert scada.standing(LAN_02) == [WANTED, (11, T0 - HOUR, T0)]
        assert scada.faults == []


@pytest.mark.parametrize("operation", ["allocations", "insert_allocation"])
def test_a_lasting_fault_of_an_insert_fails_the_step_and_says_so(scada, insert, operation):
    for fault, text in FATAL.items():
        scada.faults += [(operation, fault)]
        job, steps = insert()
        assert steps[0]["comment"].startswith(f"{operation}: ")
        assert text in steps[0]["comment"]
        assert "k3y" not in json.dumps([job, steps], default=str)
    assert scada.allocations == {}


def test_an_insert_the_server_does_not_understand_is_noticed(scada, insert, monkeypatch, tmp_path):
    (tmp_path / "operations.json").write_text(
        '{"insert_allocation": {"fields": {"categoryId": "category"}}}')
    monkeypatch.setenv("BAZEFIELD_OPERATIONS", str(tmp_path / "operations.json"))
    _, steps = insert()
    assert "Bazefield accepted the allocation, but it is not there" in steps[0]["comment"]


def test_a_route_of_ones_own_may_name_type_and_object(plain, insert, monkeypatch, tmp_path):
    (tmp_path / "operations.json").write_text(json.dumps({"allocations": {
        "route": "/api/allocations/{type_id}/from/{from}/to/{to}?turbineids={object_id}"}}))
    monkeypatch.setenv("BAZEFIELD_OPERATIONS", str(tmp_path / "operations.json"))
    assert insert()[1][0]["state"] == "Finished"
    request = plain.calls("allocations")[0]
    assert (request["type"], request["turbineids"]) == ("1", LAN_01)


@pytest.mark.parametrize(("object_filter", "comment"), [
    ({"selected": {}}, "object_filter.selected is empty"),
    ({"selected": {"instances": ["LAN-01", "X"], "types": ["Y"], "parent": ["Z"]},
      "ignored": {"models": ["W"]}},
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


# What a server may do by itself, and what cannot be told.

PERIODS = [(T0 - HOUR, T0 + DAY + HOUR), (T0 - HOUR, T0 + HOUR), (T0 + HOUR, T0 + DAY + HOUR),
           (T0, T0 + DAY), (T0 + HOUR, T0 + 2 * HOUR)]


@pytest.mark.parametrize(("start", "end"), PERIODS)
def test_a_server_that_cuts_what_it_shows_loses_nothing(plain, insert, start, end):
    plain.ways.cuts = True
    plain.add_allocation(LAN_01, 11, start, end)
    _, steps = insert(on_overlap="replace")
    assert steps[0]["result"]["replaced"] == [71]
    assert plain.standing(LAN_01) == [WANTED, *outside(start, end)]


@pytest.mark.parametrize(("start", "end"), PERIODS)
def test_a_server_that_trims_by_itself_is_noticed_and_loses_nothing(plain, insert, start, end):
    plain.ways.trims = True
    plain.add_allocation(LAN_01, 11, start, end)
    _, steps = insert(on_overlap="replace")
    assert "71 was changed while it was being replaced" in steps[0]["comment"] or (
        "allocation: status 404" in steps[0]["comment"])
    for _ in range(3):
        _, steps = insert(on_overlap="replace")
    assert steps[0]["result"]["standing"]
    assert plain.standing(LAN_01) == [WANTED, *outside(start, end)]


def outside(start, end):
    return [(11, start, T0)] * (start < T0) + [(11, T0 + DAY, end)] * (end > T0 + DAY)


def test_what_reaches_beyond_the_window_does_not_stand_exactly_so(plain, insert):
    plain.ways.cuts = True
    plain.add_allocation(LAN_01, 10, T0 - HOUR, T0 + DAY + HOUR)
    _, steps = insert()
    assert "Other allocations stand in the window" in steps[0]["comment"]


CHANGES = [{"approved": True}, {"holdCategory": True}, {"end": T0 + 2 * HOUR},
           {"category": {"id": 11, "name": "Service", "typeId": 1, "color": "red"}},
           {"lastComment": {"text": "do not touch"}}]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("operation", ["insert_allocation", "allocations"])
def test_what_changes_before_it_is_deleted_stays(scada, insert, change, operation):
    scada.ways.late = {}
    scada.add_allocation(LAN_01, 11, T0 - HOUR, T0 + HOUR)

    def somebody(_request):
        if len(scada.calls("insert_allocation")) == 1:
            scada.allocations[71].update(change)
    scada.after[operation] = somebody
    _, steps = insert(on_overlap="replace")
    assert 71 in scada.allocations
    assert "Allocation 71 was changed while it was being replaced" in steps[0]["comment"]
    assert next(iter(change)) in steps[0]["comment"]


def test_the_remainder_is_never_the_one_that_is_about_to_go(plain, insert):
    """Trimmed by somebody else to exactly what would be left of it."""
    plain.add_allocation(LAN_01, 11, T0 - HOUR, T0 + HOUR)
    plain.after["allocation"] = lambda r: plain.allocations[71].update({"end": T0})
    _, steps = insert(on_overlap="replace")
    assert "Allocation 71 was changed" in steps[0]["comment"]
    assert plain.standing(LAN_01) == [(11, T0 - HOUR, T0)]


HIGH = "F164AFE219C9D000"


@pytest.mark.parametrize("on_overlap", ["fail", "replace"])
def test_an_id_is_understood_however_it_is_spelled(plain, insert, conn, on_overlap):
    conn.execute("UPDATE objects SET bazefield_id = %s WHERE name = 'LAN-01'", [HIGH])
    plain.objects[HIGH] = plain.objects.pop(LAN_01)
    shown, number = plain.shown, int(HIGH, 16)
    for given in (HIGH.lower(), number, number - 2**64, str(number), str(number - 2**64)):
        plain.allocations.clear()
        old = plain.add_allocation(HIGH, 11, T0, T0 + HOUR)
        plain.shown = lambda a, *cut, given=given: shown(a, *cut) | {"objectId": given}
        _, steps = insert(on_overlap=on_overlap)
        if on_overlap == "fail":
            assert f"nothing was inserted: {old} ('Service'" in steps[0]["comment"]
        else:
            assert steps[0]["result"]["replaced"] == [old]


def test_what_cannot_be_attributed_stops_the_step_before_any_write(plain, insert):
    plain.add_allocation(LAN_01, 11, T0, T0 + HOUR)
    shown = plain.shown
    for given in (None, "", float(int(LAN_01, 16)), "LAN-01", True, 2**64, [LAN_01], {"id": 1},
                  "9" * 5_000):
        plain.shown = lambda a, *cut, given=given: shown(a, *cut) | {"objectId": given}
        _, steps = insert(on_overlap="replace")
        assert "nobody can tell whose it is" in steps[0]["comment"]
    plain.shown = lambda a, *cut: {k: v for k, v in shown(a, *cut).items() if k != "objectId"}
    _, steps = insert(on_overlap="replace")
    assert "objectId None: nobody can tell whose it is" in steps[0]["comment"]
    assert not plain.calls("insert_allocation") + plain.calls("delete_allocation")


def test_what_is_wrong_with_other_objects_is_not_our_business(plain, insert):
    plain.add_allocation(LAN_02, 11, T0, T0 + HOUR)
    shown = plain.shown
    plain.shown = lambda a, *cut: shown(a, *cut) | (
        {"start": None, "category": 7} if a["id"] == 71 else {})
    assert insert()[1][0]["result"]["inserted"] == [72]


def test_sixteen_digits_may_be_hex_or_decimal():
    assert bazefield_answer.is_object("1164219000000000", "1164219000000000") is True
    assert bazefield_answer.is_object("1234567890123456", f"{1234567890123456:016X}") is None


@pytest.mark.parametrize(("change", "of_ours"), [
    ({"category": None}, True), ({"category": {"id": 11, "name": "Service"}}, True),
    ({"category": None, "categories": [{"id": 30, "typeId": 3}, {"id": 11, "typeId": 1}]}, True),
    ({"category": {"id": 30, "typeId": 3}, "categories": {"1": {"id": 11, "typeId": 1}}}, True),
    ({"category": {"id": 30, "typeId": 3}}, False),
])
def test_an_allocation_with_members_left_out_is_understood(scada, insert, change, of_ours):
    scada.add_allocation(LAN_01, 11, T0 - HOUR, T0 + HOUR, **change)
    _, steps = insert(on_overlap="skip")
    assert steps[0]["result"]["skipped"] == [71] * of_ours
    _, steps = insert(on_overlap="replace")
    assert (71 in scada.allocations) == (not of_ours or change.get("categories") is None)


def test_an_allocation_that_makes_no_sense_is_named(plain, insert):
    plain.add_allocation(LAN_01, 11, T0, T0 + HOUR)
    shown = plain.shown
    for change, comment in [
        ({"id": None}, "allocations: [0].id is missing"),
        ({"id": "x"}, "allocations: [0].id is 'x', not a whole number"),
        ({"start": None}, "allocations: [0] has no period"),
        ({"start": T0 // 1000}, f"allocations: [0].start is {T0 // 1000}, not a moment"),
        ({"start": "soon"}, "allocations: [0].start is 'soon', not a moment"),
        ({"end": [1]}, "allocations: [0].end is a list, not a moment"),
        ({"end": "/Date(1e3)/"}, "allocations: [0].end is '/Date(1e3)/', not a moment"),
        ({"category": "Night"}, "allocations: [0].category is 'Night', not an object"),
        ({"category": {"id": 1, "typeId": "1"}}, "[0].category.typeId is '1', not a whole number"),
        ({"manual": "yes"}, "allocations: [0].manual is 'yes', not true or false"),
    ]:
        plain.shown = lambda a, *cut, change=change: shown(a, *cut) | change
        _, steps = insert(on_overlap="replace")
        assert comment in steps[0]["comment"]
    assert not plain.calls("insert_allocation") + plain.calls("delete_allocation")


@pytest.mark.parametrize("on_overlap", ["fail", "skip", "replace"])
def test_what_somebody_else_inserts_meanwhile_is_named(scada, insert, on_overlap):
    scada.ways.late, scada.ways.cuts = {}, False
    scada.before["insert_allocation"] = lambda r: scada.add_allocation(LAN_01, 11, T0, T0 + HOUR)
    _, steps = insert(on_overlap=on_overlap)
    assert ("All was done, but what stands now is not what is wanted alone: 71 ('Service', "
            "2026-03-01 00:00:00Z to 2026-03-01 01:00:00Z), 72 ('Night'") in steps[0]["comment"]


def test_two_that_stand_exactly_so_are_an_error_that_names_both(scada, insert):
    scada.add_allocation(LAN_01, 10, T0, T0 + DAY)
    scada.add_allocation(LAN_01, 10, T0, T0 + DAY)
    _, steps = insert()
    assert "2 allocations stand exactly so: 71, 72; delete all but one" in steps[0]["comment"]
    assert scada.calls("insert_allocation") == []


def test_a_right_that_is_refused_in_silence_is_noticed(scada, insert):
    scada.ways.refuses_silently = True
    _, steps = insert()
    assert "Bazefield accepted the allocation, but it is not there 15 s later" \
        in steps[0]["comment"]
    assert len(scada.calls("insert_allocation")) == 1
