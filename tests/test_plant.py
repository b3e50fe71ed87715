"""plant.py: what is wrong with a park's file, and what applying one changes."""

import subprocess
import sys
from pathlib import Path

import psycopg
import pytest
from helpers import wait_for
from park import MIDNIGHT, add_samples

import jobs
import plant

ROOT = Path(__file__).parents[1]
LATER = MIDNIGHT.replace(hour=1)

PARK = """\
# A park of fifty equal turbines, two masts and a substation.
[models.park]
type = "wind_farm"

[models.mast]
type = "met_mast"

[models.mast.features]
wind_speed = { unit = "m/s" }

[models."SG 3.4"]
type = "wind_turbine"

[models."SG 3.4".features]
wind_speed   = { unit = "m/s" }
active_power = { unit = "kW" }
energy       = { unit = "kWh", interval = "1 day" }
state        = {}

[models."SG 3.4".alarms]
111 = { name = "storm", trigger = "wind_speed > 19.5" }
112 = { name = "low output", trigger = "active_power < 40", gives_way_to = [111] }
113 = { trigger = "state > 3", gives_way_to = [111, 112] }

[models."SG 3.4".alarms.114]
name = "by the controller"
trigger = { trigger_type = "controller", code = [7, 8] }

[objects]
LAN = { model = "park" }
"LAN-{01..50}" = { model = "SG 3.4", parent = "LAN" }
LAN-51 = { model = "SG 3.4", parent = "LAN", bazefield_id = "0123456789ABCDEF" }
"M{1..2}" = { model = "mast", bazefield_id = ["000000000000000a", "000000000000000b"] }

[csv]
zone = "Europe/Madrid"
stamps = "start"
columns = { "Wind (m/s)" = "wind_speed" }
"""


@pytest.fixture
def run(tmp_path, capsys):
    """Write a park's file and run a command on it; return status, stdout, stderr."""
    def run(command, text=PARK, *options):
        path = tmp_path / "park.toml"
        path.write_text(text)
        status = plant.main([command, *([str(path)] if command != "export" else []), *options])
        told = capsys.readouterr()
        return status, told.out, told.err.replace(f"{tmp_path}/", "")
    return run


def changed(old, new, text=PARK):
    assert old in text
    return text.replace(old, new)


TABLES = ("object_types", "object_models", "features", "alarms", "objects")


def rows(conn):
    return {table: sorted(map(str, conn.execute(f"SELECT xmin::text, * FROM {table}").fetchall()))
            for table in TABLES}


# ----------------------------------------------------------------------------------------- check


def test_a_good_file_needs_no_database(run, monkeypatch):
    monkeypatch.setenv("PERFDB_DSN", "host=/nowhere")
    status, told, error = run("check")
    assert (status, error) == (0, "")
    assert told.endswith("park.toml: 3 types, 3 models, 5 features, 4 alarms, 54 objects\n")
    assert PARK.count("\n") <= 60


STORM = '111 = { name = "storm", trigger = "wind_speed > 19.5" }'
LOW = '112 = { name = "low output", trigger = "active_power < 40", gives_way_to = [111] }'
THRESHOLD = 'trigger_type = "threshold", threshold_type = "high", feature_name = "wind_speed"'


@pytest.mark.parametrize(("old", "new", "said"), [
    pytest.param("wind_speed > 19.5", "wind > 19.5", "alarm 111: trigger.feature_name: the model "
                 "has no feature 'wind'; it has wind_speed, active_power, energy, state",
                 id="unknown feature in a trigger"),
    pytest.param("gives_way_to = [111, 112]", "gives_way_to = [115]",
                 "alarm 113 gives way to 115, which model 'SG 3.4' does not have; it has 111, ",
                 id="priority on an alarm that is not there"),
    pytest.param("19.5\" }", "19.5\", gives_way_to = [113] }",
                 "alarms give way to each other in a circle: ", id="circle"),
    pytest.param("19.5\" }", "19.5\", gives_way_to = [111] }", "circle: 111 -> 111; take one out",
                 id="gives way to itself"),
    pytest.param("\n113 =", "\n0112 =", "alarm 112 of model 'SG 3.4' stands here a second time",
                 id="duplicate number"),
    pytest.param("\n113 =", "\n112  =", "models.SG 3.4.alarms.112 stands here for the second "
                 "time; first in line 22", id="duplicate key"),
    pytest.param("113 =", "x13 =", "alarm 'x13': the key is its number", id="no number"),
    pytest.param("113 =", "9999999999 =", "alarm '9999999999': the key", id="number too large"),
    pytest.param("wind_speed > 19.5", "wind_speed = 19.5",
                 "alarm 111: trigger 'wind_speed = 19.5' is not like \"wind_speed > 19\"",
                 id="trigger that is none"),
    pytest.param('"wind_speed > 19.5"', f"{{ {THRESHOLD} }}",
                 "alarm 111: trigger: 'threshold_value' is a required property",
                 id="half a trigger"),
    pytest.param('"wind_speed > 19.5"', f'{{ {THRESHOLD}, threshold_value = "high" }}',
                 "alarm 111: trigger.threshold_value: 'high' is not of type 'number'",
                 id="wrong type in a trigger"),
    pytest.param('"wind_speed > 19.5"', f"{{ {THRESHOLD}, threshold_value = nan }}",
                 "alarm 111: trigger: no JSON can say it", id="nan"),
    pytest.param("code = [7, 8]", "code = 2026-03-01", "alarm 114: trigger: no JSON can say it",
                 id="a date in a trigger"),
    pytest.param("code = [7, 8]", r'code = "\\\u0000"', "alarm 114: trigger: PostgreSQL cannot "
                 r"store \u0000", id="NUL in a trigger"),
    pytest.param("LAN-51 =", r'"LAN-51\u0000" =', "does not match", id="NUL in a name"),
    pytest.param("LAN-51 =", r'"LAN\51" =', "not TOML: Unescaped", id="a name with a backslash"),
    pytest.param('name = "storm"', 'nane = "storm"', "models.SG 3.4.alarms.111: unknown key "
                 "'nane'; known are name, trigger, gives_way_to", id="unknown key"),
    pytest.param('name = "storm"', "name = 7", "models.SG 3.4.alarms.111.name: 7 is not of type "
                 "'string'", id="wrong type"),
    pytest.param("[objects]", "[object]", "the file: unknown key 'object'; known are models, "
                 "objects, csv", id="unknown table"),
    pytest.param('interval = "1 day"', 'interval = "1 dya"',
                 "feature 'energy': interval '1 dya' is no length of time", id="bad interval"),
    pytest.param('interval = "1 day"', 'interval = "0 minutes"', "'0 minutes' is not more than 0",
                 id="no interval"),
    pytest.param("0123456789ABCDEF", "123", "object 'LAN-51': Bazefield id '123' is not 16 "
                 "hexadecimal digits", id="bad Bazefield id"),
    pytest.param("000000000000000b", "0123456789abcdef", "has the Bazefield id of 'LAN-51'",
                 id="a Bazefield id twice"),
    pytest.param('["000000000000000a", ', '[ ', "1 Bazefield ids for 2 objects",
                 id="too few Bazefield ids"),
    pytest.param('LAN-51 = { model = "SG 3.4"', 'LAN-51 = { model = "SG34"', "object 'LAN-51': "
                 "there is no model 'SG34'; there are park, mast, SG 3.4", id="unknown model"),
    pytest.param('LAN-51 = { model = "SG 3.4", parent = "LAN"',
                 'LAN-51 = { model = "SG 3.4", parent = "LNA"', "object 'LAN-51': there is no "
                 "parent 'LNA'", id="unknown parent"),
    pytest.param('LAN = { model = "park" }', 'LAN = { model = "park", parent = "LAN-07" }',
                 "stands under itself: ", id="its own ancestor"),
    pytest.param("LAN-51 =", "LAN-07 =", "object 'LAN-07' stands here a second time",
                 id="a name twice"),
    pytest.param('"LAN-{01..50}"', '"LAN-{50..01}"', "the range {50..01} is empty",
                 id="empty range"),
    pytest.param('LAN = { model = "park" }', 'LAN = { parent = "LAN" }',
                 "objects.LAN: 'model' is a required property", id="no model"),
    pytest.param('stamps = "start"', 'stamps = "begin"', "csv.stamps: 'begin' is not one of",
                 id="bad setting"),
    pytest.param('LAN = { model = "park" }', "LAN = { model = ", "not TOML: ", id="no TOML"),
])
def test_a_mistake_is_named_with_its_place(run, old, new, said):
    text = changed(old, new)
    line = text[:text.index(new)].count("\n") + 1 + new.startswith("\n")
    status, told, error = run("check", text)
    assert (status, told) == (1, "")
    places = [problem for problem in error.splitlines() if said in problem]
    assert places, error
    assert {tuple(place.split(":")[:2]) for place in places} == {("park.toml", str(line))}


@pytest.mark.parametrize("value", ["[" * 3000 + "]" * 3000, "1" + "0" * 5000])
def test_what_python_cannot_read_is_said_of_the_file(run, value):
    status, _, error = run("check", f"a = {value}")
    assert status == 1
    assert error.startswith("park.toml:1: cannot be read: ")


@pytest.mark.parametrize("text", ['[[objects]]\nname = "A"\n[[objects]]\nname = "B"\n',
                                  '[models.G97]\ntype = """\na = 1\na = 2"""\nx = 1\n'])
def test_a_key_that_stands_again_elsewhere_is_none_that_stands_twice(run, text):
    error = run("check", text)[2]
    assert "is not of type 'object'" in error or "unknown key 'x'" in error
    assert "second time" not in error


def test_everything_wrong_is_said_at_once_in_the_order_of_the_file(run):
    text = changed("wind_speed > 19.5", "wind > 19.5", changed("0123456789ABCDEF", "123", changed(
        'interval = "1 day"', 'interval = "x"', changed("\n113 =", "\n112 ="))))
    error = run("apply", text)[2]
    assert [problem.split(":")[:2] for problem in error.splitlines()] == [
        ["park.toml", n] for n in ("17", "21", "23", "32")]


# ----------------------------------------------------------------------------------------- apply


def test_a_file_is_applied_and_the_second_time_there_is_nothing_to_do(run, conn):
    status, told, _ = run("apply")
    assert status == 0
    assert told.splitlines()[-1] == "69 added, 0 changed, 0 removed"
    assert "+ feature SG 3.4 / energy (unit kWh, interval 1 day)" in told.splitlines()
    assert "+ object  LAN-07 (model SG 3.4, parent LAN)" in told.splitlines()
    before = rows(conn)
    assert run("apply") == (0, "nothing to do\n", "")
    assert rows(conn) == before
    alarms = conn.execute("SELECT manufacturer_id, trigger, non_overlapping_alarms FROM alarms "
                          "ORDER BY 1").fetchall()
    assert [tuple(alarm.values()) for alarm in alarms][1:] == [
        (112, {"trigger_type": "threshold", "threshold_type": "low",
               "feature_name": "active_power", "threshold_value": 40}, [111]),
        (113, {"trigger_type": "threshold", "threshold_type": "high", "feature_name": "state",
               "threshold_value": 3}, [111, 112]),
        (114, {"trigger_type": "controller", "code": [7, 8]}, [])]
    named = {o["name"]: o for o in conn.execute("SELECT * FROM objects")}
    assert named["M2"]["bazefield_id"] == "000000000000000b"
    assert named["LAN-07"]["parent_id"] == named["LAN"]["id"]
    assert conn.execute("SELECT sample_interval::text FROM features WHERE name = 'energy'"
                        ).fetchone()["sample_interval"] == "1 day"


def test_what_is_exported_is_what_was_applied(run, conn):
    run("apply")
    conn.execute("UPDATE features SET sample_interval = '1 mon 2 days 03:04:05' "
                 "WHERE name = 'state'")
    conn.execute("UPDATE alarms SET trigger = trigger || '{\"threshold_value\": 1e-7}' "
                 "WHERE manufacturer_id = 113")
    status, told, error = run("export")
    assert (status, error) == (0, "")
    assert '113 = { trigger = "state > 1e-07", gives_way_to = [111, 112] }' in told
    assert 'interval = "1 month 2 days 3 hours 4 minutes 5 seconds"' in told
    assert run("apply", told, "--remove") == (0, "nothing to do\n", "")


def test_a_dry_run_prints_the_plan_and_does_nothing(run, conn):
    status, told, _ = run("apply", PARK, "--dry-run")
    assert status == 0
    assert told.splitlines()[-1] == "69 added, 0 changed, 0 removed; nothing was done"
    assert rows(conn) == {table: [] for table in TABLES}


def test_what_differs_is_changed_and_printed_and_nothing_else_is_touched(run, conn):
    run("apply")
    before = rows(conn)
    text = changed("19.5", "25", changed('unit = "kW" }', 'unit = "MW" }', changed(
        'LAN-51 = { model = "SG 3.4", parent = "LAN"', 'LAN-51 = { model = "SG 3.4"')))
    status, told, _ = run("apply", text)
    assert (status, told.splitlines()) == (0, [
        "~ feature SG 3.4 / active_power: unit kW -> MW",
        "~ alarm   SG 3.4 / 111: trigger wind_speed > 19.5 -> wind_speed > 25",
        "~ object  LAN-51: parent LAN -> none", "",
        "0 added, 3 changed, 0 removed",
        "what alarms_history has of the alarms 111 follows their former definition: ask for an "
        "Alarm Calculation of its time"])
    after = rows(conn)
    assert {table: len(set(after[table]) - set(before[table])) for table in TABLES} == {
        "object_types": 0, "object_models": 0, "features": 1, "alarms": 1, "objects": 1}
    assert run("apply", text)[1] == "nothing to do\n"


GONE = ("energy", "113", "LAN-51", '"M{', "[models.mast", 'type = "met', "wind_speed = ")
SMALL = "\n".join(line for line in PARK.splitlines() if not line.startswith(GONE))


def test_what_the_file_has_not_stays_unless_it_is_to_be_removed(run, conn):
    run("apply")
    assert run("apply", SMALL) == (
        0, "nothing to do\nnot in the file and left as they are (--remove removes them): "
           "1 type, 1 model, 2 features, 1 alarm, 3 objects\n", "")
    status, told, _ = run("apply", SMALL, "--remove")
    assert (status, told.splitlines()) == (0, [
        "- object  LAN-51", "- object  M1", "- object  M2", "- alarm   SG 3.4 / 113",
        "- feature SG 3.4 / energy", "- feature mast / wind_speed", "- model   mast",
        "- type    met_mast", "", "0 added, 0 changed, 8 removed"])
    assert run("apply", SMALL, "--remove")[1] == "nothing to do\n"


@pytest.mark.parametrize("table", ["alarms_history", "alarms_detected"])  # or hidden by another
@pytest.mark.parametrize(("samples", "text", "said"), [
    (("LAN-51", "wind_speed"), SMALL, "object LAN-51: 2 samples, 1 alarm periods"),
    (("LAN-01", "energy"), SMALL, "feature SG 3.4 / energy: 2 samples, 0 alarm periods"),
    (("LAN-01", None), SMALL, "alarm SG 3.4 / 113: 0 samples, 1 alarm periods"),
    (("M1", "wind_speed"), changed('2}" = { model = "mast"', '2}" = { model = "SG 3.4"'),
     "object M1: 2 samples, 1 alarm periods"),
])
def test_nothing_is_removed_that_samples_or_history_belong_to(run, conn, samples, text, said,
                                                              table):
    run("apply")
    object_name, feature = samples
    if feature:
        found, = conn.execute(
            "SELECT f.id FROM features f JOIN objects o USING (object_model_id) "
            "WHERE o.name = %s AND f.name = %s", samples).fetchall()
        add_samples(conn, {MIDNIGHT: 1.0, LATER: None}, object_name, found["id"])
    if feature != "energy":
        conn.execute(f"INSERT INTO {table} (object_id, alarm_id, start_time, end_time) "
                     "SELECT o.id, a.id, %s, %s FROM objects o, alarms a "
                     "WHERE o.name = %s AND a.manufacturer_id = 113",
                     [MIDNIGHT, LATER, object_name])
    before = rows(conn)
    status, _, error = run("apply", text, "--remove")
    assert status == 1
    assert f"  {said}\n" in error
    assert rows(conn) == before
    for statement in [line for line in error.splitlines() if "DELETE" in line]:
        conn.execute(statement)  # the remedy it names
    assert run("apply", text, "--remove")[0] == 0


def test_it_is_all_or_nothing(run, conn):
    run("apply")
    before = rows(conn)
    conn.execute("ALTER TABLE objects ADD CONSTRAINT nobody_else CHECK (name <> 'LAN-60')")
    text = changed("19.5", "25", changed("01..50", "01..60").replace("LAN-51", "LAN-99"))
    status, _, error = run("apply", text)
    assert status == 1
    assert "nobody_else" in error
    assert rows(conn) == before


def test_two_that_apply_at_once_take_turns(run, dsn, conn, tmp_path):
    (tmp_path / "park.toml").write_text(PARK)
    with psycopg.connect(dsn) as other:
        other.execute("SELECT pg_advisory_xact_lock('objects'::regclass::oid::int, "
                      "hashtext('plant'))")
        command = [sys.executable, str(ROOT / "plant.py"), "apply", str(tmp_path / "park.toml")]
        commands = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in "ab"]
        wait_for(lambda: conn.execute("SELECT count(*) = 2 AS both FROM pg_stat_activity WHERE "
                                      "application_name = 'plant apply' AND wait_event_type = "
                                      "'Lock'").fetchone()["both"])
    told = sorted(command.communicate(timeout=20)[0] for command in commands)
    assert [command.returncode for command in commands] == [0, 0]
    assert told[1] == "nothing to do\n"
    assert "69 added" in told[0]


def test_a_pipe_that_is_closed_early_changes_nothing(run, conn, dsn, tmp_path):
    (tmp_path / "park.toml").write_text(PARK)
    command = f"{sys.executable} {ROOT / 'plant.py'} apply {tmp_path / 'park.toml'} | true"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert run("apply")[1] == "nothing to do\n"


def test_a_sequence_that_is_behind_is_explained(run, conn):
    conn.execute("INSERT INTO object_types (id, name) VALUES (1, 'by hand')")
    status, _, error = run("apply")
    assert status == 1
    conn.execute(error[error.index("SELECT setval"):])
    assert run("apply")[0] == 0


@pytest.mark.parametrize(("arguments", "status"), [
    (["apply"], 2), (["check", "nowhere.toml"], 1), (["export", "--dsn", "host=/nowhere"], 3),
    (["export", "--dsn", "no connection string"], 2),
])
def test_exit_statuses(dsn, capsys, arguments, status):
    try:
        found = plant.main(arguments)
    except SystemExit as exc:
        found = exc.code
    assert found == status


def test_without_tables_it_says_what_to_run(run, conn):
    conn.execute("ALTER TABLE objects RENAME TO things")
    status, _, error = run("export")
    assert status == 3
    assert "python jobctl.py init" in error


def test_what_toml_cannot_say_is_not_exported(run, conn):
    run("apply")
    conn.execute("UPDATE alarms SET trigger = %s WHERE manufacturer_id = 114",
                 [jobs.Jsonb({"trigger_type": "x", "code": None})])
    status, told, error = run("export")
    assert (status, told) == (1, "")
    assert "alarm 114 of model 'SG 3.4': a trigger holds null" in error


@pytest.mark.parametrize("change", [
    "UPDATE features SET sample_interval = '0.5 s'",
    "UPDATE features SET sample_interval = '-61.000001 s 1 h'",
    "UPDATE features SET sample_interval = '1 month -1 day'",
    "UPDATE features SET sample_interval = '1 day -02:00'",
    "UPDATE alarms SET non_overlapping_alarms = '{{111},{NULL}}' WHERE manufacturer_id = 113",
])
def test_what_was_written_by_hand_is_exported_and_changed_back(run, conn, change):
    run("apply")
    conn.execute(change)
    text = run("export")[1]
    assert run("apply", text)[:2] == (0, "nothing to do\n")
    assert run("apply")[0] == 0
    assert run("apply") == (0, "nothing to do\n", "")


@pytest.mark.parametrize(("old", "new"), [
    ("LAN-51 =", r'"x\u001b[31m" ='), ("energy  ", r'"x\u001b[31m"'),
    ('"by the controller"', r'"x\u001b[31m"')])
def test_control_characters_are_shown_as_text(run, conn, old, new):
    text = changed(old, new)
    told = [*run("apply", text)[1:], *run("check", text.replace("ABCDEF", "x"))[1:],
            *run("apply", "", "--remove")[1:]]
    assert r"x\x1b[31m" in told[0]
    assert "\x1b" not in "".join(told)


def test_a_threshold_that_is_no_number_is_not_exported_as_one(run, conn):
    run("apply")
    conn.execute("""UPDATE alarms SET trigger = trigger || '{"threshold_value": "40"}'
                     WHERE manufacturer_id = 112""")
    assert "threshold_value: '40' is not of type 'number'" in run("check", run("export")[1])[2]
