"""samples.py load: what stands in feature_values afterwards, and what is told about it."""

import csv
import os
import pty
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg
import pytest
from helpers import wait_for
from park import add_samples, every_ten_minutes, history, make_park, periods, trigger

import alarm_calc  # noqa: F401  its type
import control
import perfdb
import samples
from csv_samples import Piece, Signal
from jobs import Jsonb
from samples_store import Store

ROOT = Path(__file__).parents[1]
REAL_YEAR = ROOT.parent / "shared" / "data" / "yalova_2018_10min.csv"
MARCH = datetime(2026, 3, 1, tzinfo=UTC)
GIVEN = ("--zone", "UTC", "--stamps", "end")


@pytest.fixture
def park(conn):
    """Two turbines; alarm 111 above 10 m/s, 112 below 40 kW."""
    control.write_types(conn)
    make_park(conn, alarms={111: (trigger(), []),
                            112: (trigger("low", "active_power", 40), [111])})


@pytest.fixture
def load(park, tmp_path, capsys):
    """Write a file of (time, value) rows and load it; return status, stdout, stderr."""
    def load(rows, *options, name="LAN-01.csv", head="time,wind_speed", given=GIVEN):
        path = tmp_path / name
        path.write_text("\n".join([head, *rows]) + "\n")
        status = samples.main(["load", str(path), *given, *options])
        told = capsys.readouterr()
        return status, told.out, told.err
    return load


def stored(conn, feature_id=1):
    """Return {time: value} of LAN-01."""
    return {r["timestamp"]: r["value"] for r in conn.execute(
        "SELECT timestamp, value FROM feature_values v JOIN objects o ON o.id = v.object_id "
        "WHERE o.name = 'LAN-01' AND feature_id = %s ORDER BY 1", [feature_id])}


def versions(conn):
    """Return what changes when a row is written anew, be it as it was."""
    return conn.execute("SELECT ctid::text, xmin::text FROM feature_values ORDER BY 1").fetchall()


def ten_minutes(values, start=MARCH):
    """Return rows of a file, the first ten minutes after `start`."""
    return [f"{start + (n + 1) * timedelta(minutes=10):%Y-%m-%d %H:%M},{value}"
            for n, value in enumerate(values)]


# ----------------------------------------------------------------------------------------- writing


def test_samples_come_in_and_the_same_file_again_touches_nothing(load, conn):
    assert load(ten_minutes([5, 6, 7])) == (
        0, "LAN-01.csv: 3 samples: 3 new, 0 changed, 0 as they stood\n", "")
    assert stored(conn) == every_ten_minutes([5.0, 6.0, 7.0])
    before = versions(conn)
    assert load(ten_minutes([5, 6, 7])) == (
        0, "LAN-01.csv: 3 samples: 0 new, 0 changed, 3 as they stood\n", "")
    assert versions(conn) == before


def test_samples_and_jobs_beyond_the_calendar_are_passed_over(load, conn):
    """As by hand: an open end in the samples, a job whose parameters were changed later."""
    conn.execute("INSERT INTO feature_values VALUES (1, 1, 'infinity', 1), (1, 1, '20000-1-1', 1)")
    for names in ([["LAN-01"]], None):
        conn.execute("INSERT INTO job_instances (job_type_id, state, started, parameters) "
                     "SELECT id, 'Running', now(), %s FROM job_types "
                     "WHERE name = 'Alarm Calculation'",
                     [Jsonb({"object_names": names, "start": "2026-03-01 00:00:00",
                             "end": "2026-04-01 00:00:00"})])
    assert load(ten_minutes([5]))[0::2] == (0, "")


def test_a_pipe_is_refused(load, tmp_path):
    os.mkfifo(tmp_path / "LAN-02.csv")
    status, _, error = load([], given=(str(tmp_path / "LAN-02.csv"), *GIVEN))
    assert status == 1
    assert "LAN-02.csv: it can be read only once; write it to a file first" in error


@pytest.mark.parametrize("text", [";;", "", '"', "\n"])
def test_what_is_no_delimiter_is_wrong_usage(load, capsys, text):
    with pytest.raises(SystemExit) as left:
        load(ten_minutes([5]), "--delimiter", text)
    assert left.value.code == 2
    assert "write one sign" in capsys.readouterr().err


def test_a_tab_may_be_written_as_a_backslash_and_t(load):
    rows = [row.replace(",", "\t") for row in ten_minutes([5])]
    assert load(rows, "--delimiter", "\\t", head="time\twind_speed")[0] == 0


def test_only_what_differs_is_written(load, conn):
    load(ten_minutes([5, "", 7, 8]))
    before = versions(conn)
    status, told, _ = load(ten_minutes([5, "", "-999", 9, 10]), "--none", "-999")
    assert (status, told.splitlines()[0]) == (
        0, "LAN-01.csv: 5 samples: 1 new, 2 changed, 2 as they stood")
    assert stored(conn) == every_ten_minutes([5.0, None, None, 9.0, 10.0])
    assert len(set(map(str, versions(conn))) & set(map(str, before))) == 2


def test_the_last_of_equal_times_counts_and_is_told(load, conn):
    status, told, _ = load(ten_minutes([5, 6]) + ten_minutes([7]))
    assert (status, told) == (0, "LAN-01.csv: 3 samples: 2 new, 0 changed, 0 as they stood; "
                                 "1 duplicate, the last one counts\n")
    assert stored(conn) == every_ten_minutes([7.0, 6.0])


def test_lines_that_are_refused_are_shown_and_the_others_loaded(load, conn):
    rows = ten_minutes([5, "Bad"]) + [f"nonsense,{n}" for n in range(20)] + ten_minutes([6] * 30)
    status, told, error = load(rows)
    assert (status, told) == (1, "LAN-01.csv: 31 samples: 30 new, 0 changed, 0 as they stood; "
                                 "1 duplicate, the last one counts\n")
    assert error.splitlines()[:3] == [
        "LAN-01.csv: 21 lines refused:",
        "  line 3: column 'wind_speed': 'Bad' is no number; --none 'Bad' if it stands for "
        "no value",
        "  line 4: 'nonsense' is no time written as YYYY-MM-DD HH:MM:SS"]
    assert error.splitlines()[-1] == "  and 11 more"
    assert stored(conn) == every_ten_minutes([6.0] * 30)


def test_a_file_that_is_not_understood_does_not_keep_the_others_out(load, conn, tmp_path):
    (tmp_path / "LAN-02.csv").write_text("time,wind_speed\n01/02/2026 00:10,5\n")
    (tmp_path / "b.csv").write_text("time,wind_speed\n2026-03-01 00:10,5\n")
    files = [str(tmp_path / name) for name in ("LAN-02.csv", "b.csv", "c.csv")]
    status, told, error = load(ten_minutes([5]), given=(*files, *GIVEN))
    assert (status, told.count("\n")) == (1, 1)
    assert error.splitlines() == [
        "samples: Not loaded:",
        "  LAN-02.csv: is '01/02/2026 00:10' day first or month first? No date in the file tells: "
        "--time-format DMY or MDY",
        "  b.csv: whose samples are these? --object NAME or --object-column COLUMN says it, or "
        "the file's name if an object's name stands in it",
        f"  {files[2]}: cannot be read: No such file or directory"]
    assert stored(conn) == every_ten_minutes([5.0])


def test_without_zone_and_stamps_both_are_asked_for_once(load, tmp_path):
    (tmp_path / "LAN-02.csv").write_text("time,wind_speed\n2026-03-01 00:10,5\n")
    status, told, error = load(ten_minutes([5]), given=(str(tmp_path / "LAN-02.csv"),))
    assert (status, told) == (1, "")
    assert [line[:26] for line in error.splitlines()[1:]] == ["  LAN-01.csv, LAN-02.csv: "] * 2
    assert "--zone" in error
    assert "--stamps" in error


def test_a_setting_that_names_nothing_is_refused(load, conn):
    status, _, error = load(ten_minutes([5]), "--column", "wind_speed=wind")
    assert (status, stored(conn)) == (1, {})
    assert "there is no feature 'wind'; there are active_power, wind_speed" in error


def test_settings_come_from_a_layout_and_options_go_over_them(load, conn, tmp_path):
    (tmp_path / "park.toml").write_text(
        '[csv]\nzone = "Europe/Madrid"\nstamps = "start"\ntime = "time"\nnone = [-999]\n'
        'columns = { WS = "wind_speed" }\n')
    layout = ("--layout", str(tmp_path / "park.toml"))
    rows = ["2026-03-01 01:00,5", "2026-03-01 01:10,-999.0"]
    assert load(rows, head="time,WS", given=layout)[0] == 0
    assert stored(conn) == every_ten_minutes([5.0, None])
    load(["2026-03-01 00:20,6"], *layout, "--zone", "UTC", "--stamps", "end", head="time,WS")
    assert stored(conn) == every_ten_minutes([5.0, 6.0])


def test_a_malformed_layout_is_refused(load, tmp_path):
    (tmp_path / "park.toml").write_text('[csv]\nstamp = "start"\ndecimal = ";"\n')
    status, _, error = load([], given=("--layout", str(tmp_path / "park.toml")))
    assert status == 1
    assert "'stamp' was unexpected" in error
    assert "$.decimal: ';' is not one of" in error
    assert "known: encoding, delimiter" in error
    (tmp_path / "park.toml").write_text("a = " + "[" * 3000)
    status, _, error = load([], given=("--layout", str(tmp_path / "park.toml")))
    assert (status, "park.toml: maximum recursion" in error) == (1, True)


def test_a_dry_run_tells_and_writes_nothing(load, conn):
    rows = ten_minutes(["5,5", "-999", *["6"] * 8], MARCH + timedelta(days=12))
    rows = [row.replace(",", ";", 1) for row in rows[:6] + rows[7:]]
    status, told, _ = load(rows, "--dry-run", "--none", "-999", "--delimiter", ";",
                           head="time;wind_speed")
    assert (status, stored(conn)) == (0, {})
    assert "delimiter ';', decimal sign ',', header in line 1" in told
    assert "'time', written as YYYY-MM-DD HH:MM:SS, in UTC, marks the end" in told
    words = told[told.index("What there is"):].split()
    assert words[words.index("LAN-01"):] == [
        "LAN-01", "wind_speed", "m/s", "9", "8", "2026-03-13", "00:10:00", "2026-03-13",
        "01:40:00", "0:10:00", "80.0", "%"]


def test_a_dry_run_tells_what_would_be_refused(load, conn):
    status, told, error = load([*ten_minutes([5]), "nonsense,5"], "--dry-run")
    assert (status, stored(conn)) == (1, {})
    assert "What there is" in told
    assert error.startswith("LAN-01.csv: 1 line refused:\n  line 3: 'nonsense' is no time")


def test_samples_that_come_at_another_interval_are_noticed(load):
    rows = [f"{MARCH + n * timedelta(minutes=15):%Y-%m-%d %H:%M},5" for n in range(9)]
    assert load(rows)[2] == ("samples: LAN-01: samples of wind_speed come every 0:15:00, its "
                             "interval is 0:10:00: one of them is wrong\n")


@pytest.mark.parametrize("statements", [
    pytest.param("ALTER TABLE feature_values RENAME TO stored; CREATE VIEW feature_values AS "
                 "SELECT * FROM stored", id="view"),
    pytest.param("ALTER TABLE feature_values RENAME TO stored; CREATE TABLE feature_values "
                 "(LIKE stored, PRIMARY KEY (object_id, feature_id, timestamp)) "
                 "PARTITION BY RANGE (timestamp); "
                 "CREATE TABLE v1 PARTITION OF feature_values DEFAULT", id="partitioned"),
    pytest.param("ALTER TABLE feature_values ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY; "
                 "CREATE POLICY everything ON feature_values USING (true)", id="row security"),
])
def test_feature_values_may_be_something_else(load, conn, statements):
    conn.execute(statements)
    assert "2 new, 0 changed, 0 as" in load(ten_minutes([5, 6]))[1]
    assert "1 new, 1 changed, 1 as" in load(ten_minutes([5, 7, 8]))[1]
    assert stored(conn) == every_ten_minutes([5.0, 7.0, 8.0])


# --------------------------------------------------------------------------------- late, changed


def test_a_first_load_and_what_comes_after_it_is_not_late(load):
    assert "late" not in load(ten_minutes([5] * 6))[1]
    assert "late" not in load(ten_minutes([5] * 12))[1]


def test_what_fills_a_gap_or_differs_is_told_with_its_time(load, conn):
    rows = ten_minutes([5] * 300)
    load(rows[:100] + rows[103:])
    status, told, _ = load([*rows[:99], "2026-03-01 16:40,6", *rows[100:]])
    assert status == 0
    found, = (line.split() for line in told.splitlines() if "LAN-01 " in line)
    assert found == ["LAN-01", "2026-03-01", "16:30:00", "2026-03-01", "17:10:00", "3", "1",
                     "wind_speed"]
    assert "--recalculate" in told


def test_times_far_from_each_other_are_told_apart(load):
    load(ten_minutes([5] * 1000))
    told = load(["2026-03-01 00:10,6", "2026-03-01 12:00,6", "2026-03-06 00:00,6"])[1]
    assert [line.split()[1:8] for line in told.splitlines() if "LAN-01 " in line] == [
        ["2026-03-01", "00:00:00", "2026-03-01", "12:00:00", "0", "2", "wind_speed"],
        ["2026-03-05", "23:50:00", "2026-03-06", "00:00:00", "0", "1", "wind_speed"]]


def test_recalculate_asks_for_the_alarms_of_these_features_on_these_objects(
        load, conn, run_handler):
    load(ten_minutes([5, 15, 5, 15, 15, 5]))
    parameters = {"object_names": ["LAN-01"], "alarm_ids": [111],
                  "start": "2026-03-01 00:00:00", "end": "2026-03-02 00:00:00"}
    control.create_job(conn, "Alarm Calculation", parameters)
    run_handler("--once")
    assert len(history(conn, 111)) == 2
    status, told, _ = load(ten_minutes([5, 15, 15]), "--recalculate")
    assert status == 0
    assert "asked for 1 Alarm Calculation job: 2" in told
    job = conn.execute("SELECT * FROM job_instances WHERE id = 2").fetchone()
    assert job["parameters"] == parameters | {"start": "2026-03-01 00:20:00+00:00",
                                              "end": "2026-03-01 00:30:00+00:00"}
    run_handler("--once")
    assert [row[2:] for row in history(conn, 111)] == [
        (MARCH + timedelta(minutes=10), MARCH + timedelta(minutes=50))]


def test_samples_in_a_period_that_was_calculated_are_late_even_if_they_are_the_newest(
        load, conn, run_handler):
    load(ten_minutes([5]))
    control.create_job(conn, "Alarm Calculation", {
        "object_names": ["LAN-01"], "alarm_ids": [111],
        "start": "2026-03-01 00:00:00", "end": "2026-03-02 00:00:00"})
    run_handler("--once")
    told = load(ten_minutes([5] * 3, MARCH + timedelta(minutes=10)))[1]
    assert "2026-03-01 00:10:00  2026-03-01 00:40:00     3        0  wind_speed" in told
    told = load(ten_minutes([5] * 3, MARCH + timedelta(days=1)))[1]
    assert "late" not in told


def test_objects_with_the_same_period_and_alarms_share_a_job(load, conn):
    rows = [f"{at},{name},5" for at in ("2026-03-01 00:10", "2026-03-01 00:20")
            for name in ("LAN-01", "LAN-02")]
    head = "time,object,active_power"
    load(rows, head=head)
    load([row.replace(",5", ",6") for row in rows], "--recalculate", head=head)
    job, = conn.execute("SELECT parameters FROM job_instances").fetchall()
    assert job["parameters"]["object_names"] == ["LAN-01", "LAN-02"]
    assert job["parameters"]["alarm_ids"] == [112]


# ----------------------------------------------------------------- interruptions, other sessions


SMALL_PIECES = "import csv_samples; csv_samples.PIECE = 50; import samples, sys; " \
               "sys.exit(samples.main(sys.argv[1:]))"


@pytest.fixture
def start(park, tmp_path):
    """Write a file of a thousand samples and start a load of it in pieces of fifty."""
    path = tmp_path / "LAN-01.csv"
    path.write_text("time,wind_speed\n" + "\n".join(ten_minutes(range(1000))) + "\n")
    started = []

    def start(*options, **files):
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT} | files
        started.append(subprocess.Popen(
            [sys.executable, "-c", SMALL_PIECES, "load", str(path), *GIVEN, *options],
            cwd=ROOT, text=True, **pipes))
        return started[-1]
    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def hold(dsn, conn):
    """Hold a sample that the load will write, uncommitted; it waits there."""
    with psycopg.connect(dsn) as other:
        other.execute("INSERT INTO feature_values SELECT id, 1, %s, 500 FROM objects "
                      "WHERE name = 'LAN-01'", [MARCH + 501 * timedelta(minutes=10)])
        yield other


def waits(conn):
    return conn.execute("SELECT pid FROM pg_stat_activity WHERE application_name = 'samples load' "
                        "AND wait_event_type = 'Lock'").fetchone()


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_load_that_is_broken_off_goes_on_when_it_is_started_again(start, hold, conn, sent):
    process = start()
    pid = wait_for(lambda: waits(conn))["pid"]
    process.send_signal(sent)
    if sent == signal.SIGKILL:
        process.wait()
        conn.execute("SELECT pg_terminate_backend(%s)", [pid])
    hold.rollback()
    told = process.communicate(timeout=20)[0]
    if sent != signal.SIGKILL:
        assert process.returncode == 1
        assert "interrupted; start it again to load the rest" in told
    assert 500 <= len(stored(conn)) < 1000
    again = start()
    assert "0 changed" in again.communicate(timeout=20)[0]
    assert again.returncode == 0
    assert stored(conn) == every_ten_minutes(map(float, range(1000)))


@pytest.mark.parametrize("stands", [[], [510]], ids=["copied", "compared"])
def test_a_load_that_meets_another_writes_the_rest(start, hold, conn, stands):
    add_samples(conn, {MARCH + n * timedelta(minutes=10): n - 1.0 for n in stands})
    first = start()
    wait_for(lambda: waits(conn))
    hold.commit()
    told = first.communicate(timeout=20)[0]
    assert f"{999 - len(stands)} new, 0 changed, {1 + len(stands)} as they stood" in told
    assert stored(conn) == every_ten_minutes(map(float, range(1000)))


def test_two_loads_of_the_same_file_at_once_are_both_right(start, conn):
    both = [start(), start()]
    told = [process.communicate(timeout=30)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], told
    assert stored(conn) == every_ten_minutes(map(float, range(1000)))


def test_nothing_is_left_in_the_staging_table(park, dsn):
    with perfdb.connect(dsn) as connection:
        store, park = Store(connection), samples.read_park(connection, {})
        one = park.objects["LAN-01"]
        signals = {(1, 1): Signal(one, one.features["wind_speed"], None)}
        for value in (1.0, 2.0):
            store.write(Piece({(1, 1): {0: value, 600_000_000: value}}, 2, 0), signals)
        assert perfdb.query(connection, "SELECT count(*) FROM staged_samples") == [(0,)]
    assert store.counts == {"stored": 4, "new": 2, "changed": 2}


def test_what_comes_after_a_calculation_has_begun_is_late(start, hold, conn, run_handler):
    parameters = {"object_names": ["LAN-01"], "alarm_ids": [111],
                  "start": "2026-02-01 00:00:00", "end": "2026-03-01 00:00:00"}
    control.create_job(conn, "Alarm Calculation", parameters)
    conn.execute("UPDATE job_instances SET state = 'Finished', started = now(), finished = now()")
    process = start()
    wait_for(lambda: waits(conn))
    control.create_job(conn, "Alarm Calculation", parameters | {
        "start": "2026-03-01 00:00:00", "end": "2026-03-05 00:00:00"})
    run_handler("--once")
    hold.rollback()
    told = process.communicate(timeout=20)[0]
    assert "LAN-01  2026-03-04 11:20:00  2026-03-05 00:00:00    76" in told


def test_a_lost_connection_is_status_3_and_says_what_was_done(start, hold, conn):
    add_samples(conn, {MARCH + timedelta(minutes=10): 5.0})  # so that something is changed
    process = start()
    pid = wait_for(lambda: waits(conn))["pid"]
    conn.execute("SELECT pg_terminate_backend(%s)", [pid])
    told = process.communicate(timeout=20)[0]
    assert process.returncode == 3
    assert "samples: cannot reach the database" in told
    assert "LAN-01" in told


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_sees_a_bar_and_nobody_else_does(start, hold, conn, terminal):
    ours, theirs = pty.openpty()
    process = start(stderr=theirs if terminal else subprocess.PIPE)
    wait_for(lambda: waits(conn))
    wait_for(lambda: conn.execute("SELECT clock_timestamp() - query_start > '0.3 s' AS late "
                                  "FROM pg_stat_activity WHERE pid = %s",
                                  [waits(conn)["pid"]]).fetchone()["late"])
    hold.rollback()
    told, error = process.communicate(timeout=20)
    os.close(theirs)
    assert told == "LAN-01.csv: 1,000 samples: 1,000 new, 0 changed, 0 as they stood\n"
    if terminal:
        shown = os.read(ours, 10_000).decode()
        assert "samples/s" in shown
        assert "left" in shown
    else:
        assert error == ""
    os.close(ours)


@pytest.mark.parametrize(("arguments", "status"), [
    (["load"], 2), (["load", "x.csv", "--stamps", "middle"], 2),
    (["load", "x.csv", "--column", "a"], 2),
    (["load", "x.csv", "--dsn", "host=/nowhere"], 3), (["load", "x.csv"], 1),
])
def test_exit_statuses(dsn, capsys, arguments, status):
    try:
        found = samples.main(arguments)
    except SystemExit as exc:
        found = exc.code
    assert found == status


def test_without_tables_it_says_what_to_run(conn, capsys):
    conn.execute("ALTER TABLE objects RENAME TO things")
    assert samples.main(["load", "x.csv"]) == 3
    assert "python jobctl.py init" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- a real year


@pytest.mark.skipif(not REAL_YEAR.exists(), reason=f"{REAL_YEAR} is not here: real data of others")
def test_a_real_year_comes_in_by_one_command_and_its_alarms_are_right(conn, run_handler, capsys):
    control.write_types(conn)
    make_park(conn, ("YAL-01",), {111: (trigger(value=15.0), []),
                                  112: (trigger("low", "active_power", 1.0), [])})
    assert samples.main(["load", str(REAL_YEAR), "--object", "YAL-01", "--zone",
                         "Europe/Istanbul", "--stamps", "start"]) == 0
    with REAL_YEAR.open(encoding="latin-1") as file:
        rows = list(csv.reader(file))[1:]
    times = [datetime.strptime(row[0], "%d %m %Y %H:%M").replace(tzinfo=UTC)
             - timedelta(hours=2, minutes=50) for row in rows]
    control.create_job(conn, "Alarm Calculation", {
        "object_names": ["YAL-01"], "alarm_ids": [111, 112],
        "start": "2018-01-01 00:00:00+03:00", "end": "2019-01-01 00:00:00+03:00"})
    run_handler("--once")
    start, end = (datetime(year, 1, 1, tzinfo=UTC) - timedelta(hours=3) for year in (2018, 2019))
    for number, column, fires in ((111, 2, lambda v: v > 15), (112, 1, lambda v: v < 1)):
        values = dict(zip(times, (float(row[column]) for row in rows), strict=True))
        assert [row[2:] for row in history(conn, number)] == periods(values, fires, start, end)
