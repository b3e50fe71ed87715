"""jobctl.py, as people and scripts use it."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sample_jobs
from helpers import wait_for

import control
import doctor
import jobctl
import jobs
import perfdb
import tables
from worker import Worker, use_worker

ROOT = Path(__file__).parents[1]
MARCH = {"object_names": ["LAN-01"], "alarm_ids": [111],
         "start": "2026-03-01 00:00:00", "end": "2026-04-01 00:00:00"}
NIGHTLY = json.dumps({"object_names": ["LAN-01"], "alarm_ids": [111]})


@pytest.fixture
def ctl(dsn, capsys):
    """Run jobctl in this process; return what it printed."""
    def ctl(*args, expect=0):
        status = jobctl.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert (status, "Traceback" in err) == (expect, False), err
        return out if expect == 0 or out else err
    ctl("init")
    return ctl


@pytest.fixture
def usage(capsys):
    """Run jobctl with words it must refuse; return what it said."""
    def usage(*args):
        with pytest.raises(SystemExit) as exc:
            jobctl.main([str(arg) for arg in args])
        assert exc.value.code == 2
        return capsys.readouterr().err
    return usage


@pytest.fixture
def ran(ctl, conn, dsn):
    """A finished and a failed job of the type Scripted; return their ids."""
    control.write_types(conn, ["Scripted"])
    worker = Worker(dsn)
    use_worker(worker)
    ids = [control.create_job(conn, "Scripted", {"steps": steps}, text)
           for steps, text in ((["ok"], "good"), (["ok", "error"], "bad"))]
    for job_id in ids:
        sample_jobs.Scripted(job_id).run()
    use_worker(None)
    worker.close()
    return ids


def run(*args, **options):
    return subprocess.run([sys.executable, str(ROOT / "jobctl.py"), *args],
                          capture_output=True, text=True, **options)


def test_init_makes_an_empty_database_ready_and_may_be_repeated(server, template):
    import psycopg
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute("CREATE DATABASE bare")
    try:
        for _ in range(2):
            assert run("init", "--dsn", server.dsn("bare")).returncode == 0
        assert "Alarm Calculation" in run("types", "--dsn", server.dsn("bare")).stdout
    finally:
        with psycopg.connect(server.dsn(), autocommit=True) as admin:
            admin.execute("DROP DATABASE bare WITH (FORCE)")


@pytest.mark.parametrize("args", [
    [json.dumps(MARCH)],
    ["-d", "March", json.dumps(MARCH)],
    ["-"],
    ["-p", f"start={MARCH['start']}", "-p", f"end={MARCH['end']}",
     "-p", 'object_names:=["LAN-01"]', "-p", "alarm_ids:=[111]"],
])
def test_create_prints_the_id_and_nothing_else(ctl, conn, args, monkeypatch, tmp_path):
    (tmp_path / "in").write_text(json.dumps(MARCH))
    monkeypatch.setattr(sys, "stdin", (tmp_path / "in").open())
    assert ctl("create", "Alarm Calculation", *args) == "1\n"
    assert conn.execute("SELECT parameters FROM job_instances").fetchone()["parameters"] == MARCH


def test_create_with_everything(ctl, conn):
    args = ["create", "Alarm Calculation", json.dumps(MARCH), "--priority", "5",
            "--run-after", "2030-01-01 00:00:00", "--unique-key", "LAN march"]
    assert ctl(*args) == ctl(*args) == "1\n"
    job = conn.execute("SELECT * FROM job_instances").fetchone()
    assert (job["priority"], job["run_after"]) == (5, datetime(2030, 1, 1, tzinfo=UTC))


@pytest.mark.parametrize(("args", "text"), [
    (["Alarm", "{}"], "there is no job type 'Alarm'; known: 'Alarm Calculation'"),
    (["Alarm Calculation", "{}"], "$: 'object_names' is a required property"),
    (["Alarm Calculation", '{"start": 1'],
     "the parameters are not JSON: Expecting ',' delimiter: line 1 column 12"),
    (["Alarm Calculation", "[]"], "the parameters are []; write a JSON object"),
    (["Alarm Calculation", "@/no/such/file"], "cannot read the parameters"),
])
def test_create_refuses_and_says_why(ctl, conn, args, text):
    assert text in ctl("create", *args, expect=1)
    assert conn.execute("SELECT count(*) FROM job_instances").fetchone()["count"] == 0


def test_create_warns_of_a_description_the_handler_passes_over(ctl, capsys):
    assert jobctl.main(["create", "Alarm Calculation", json.dumps(MARCH), "-d", "latest"]) == 0
    assert 'contains "test"' in capsys.readouterr().err
    assert '(not taken: "test") latest' in ctl("list")


def test_list_and_its_filters(ctl, ran):
    good, bad = ran
    lines = ctl("list").splitlines()
    assert [line.split()[0] for line in lines[2:]] == [str(bad), str(good)]
    assert "1 (50.00%) steps failed" in lines[2]
    for args, ids in [(["--state", "Failed"], [bad]), (["--type", "Noop"], []),
                      (["--text", "GOO"], [good]), (["--text", "50.00%"], [bad]),
                      (["--since", "2999-01-01 00:00:00"], []), (["--limit", 1], [bad])]:
        assert [row["id"] for row in json.loads(ctl("list", "--json", *args))] == ids


def test_show_tells_steps_results_and_errors(ctl, ran):
    shown = ctl("show", ran[1])
    for part in ("Job 2  Scripted  Failed  bad", "1 of 2 done, 1 failed", "said=ok", "no wind"):
        assert part in shown
    full = json.loads(ctl("show", ran[1], "--json"))
    assert full["job"]["progress"] == 1
    assert [s["state"] for s in full["steps"]] == ["Finished", "Failed"]
    assert "there is no job 99" in ctl("show", 99, expect=1)


def test_a_long_job_is_shown_in_part(ctl, ran, conn):
    conn.execute("INSERT INTO job_steps (job_instance_id, position, name) "
                 "SELECT %s, n, 'more' FROM generate_series(3, 500) n", [ran[1]])
    shown = ctl("show", ran[1])
    assert "  400 more steps are not shown; --steps 500 shows all, failed ones come first" in shown
    assert "no wind" in shown


def test_cancel_and_retry(ctl, ran, conn):
    waiting = control.create_job(conn, "Scripted", {"steps": []})
    assert ctl("cancel", waiting, "--reason", "storm") == f"job {waiting} is cancelled\n"
    assert "cannot be cancelled: it is Finished" in ctl("cancel", ran[0], expect=1)
    assert ctl("retry", ran[1]) == f"job {ran[1]} is Queued again\n"
    assert "only a Failed job can be" in ctl("retry", ran[0], expect=1)
    assert ctl("retry", "--all", ran[0]) == f"job {ran[0]} is Queued again\n"


def test_stats(ctl, ran):
    row = next(r for r in json.loads(ctl("stats", "--json", "--since", "1h"))
               if r["job_type"] == "Scripted")
    assert (row["waiting"], row["running"], row["ended"], row["failed"]) == (0, 0, 2, 1)
    assert (row["per_hour"], row["failure_rate"]) == (2, 0.5)
    assert "50.0" in ctl("stats")


def test_prune_deletes_what_ended_long_ago_and_nothing_else(ctl, ran, conn):
    conn.execute("UPDATE job_instances SET finished = now() - interval '91 days' WHERE id = %s",
                 [ran[0]])
    waiting = control.create_job(conn, "Scripted", {"steps": []})
    assert ctl("prune", "--older-than", "90d", "--dry-run") == "1 jobs would be deleted\n"
    assert ctl("prune", "--older-than", "90d") == "1 jobs deleted\n"
    assert [r["id"] for r in conn.execute("SELECT id FROM job_instances ORDER BY id")] == [
        ran[1], waiting]
    assert conn.execute("SELECT count(*) FROM job_steps").fetchone()["count"] == 2


def test_prune_goes_in_batches_and_leaves_locked_jobs(ctl, ran, conn, dsn, monkeypatch):
    monkeypatch.setattr(control, "BATCH", 7)
    conn.execute("INSERT INTO job_instances (job_type_id, state, finished) "
                 "SELECT job_type_id, 'Finished', now() - interval '1 year' "
                 "FROM job_instances, generate_series(1, 15)")
    with perfdb.connect(dsn) as other, other.transaction():
        other.execute("SELECT FROM job_instances WHERE id = 10 FOR UPDATE")
        assert ctl("prune", "--older-than", "90d") == "29 jobs deleted\n"
    assert [r["id"] for r in conn.execute("SELECT id FROM job_instances ORDER BY id")] == [
        *ran, 10]


def test_watch_follows_a_job_to_its_end(ctl, conn, start_handler):
    control.write_types(conn, ["Scripted"])
    job_id = control.create_job(conn, "Scripted", {"steps": ["sleep"] * 4, "sleep": 0.15})
    watching = subprocess.Popen(
        [sys.executable, ROOT / "jobctl.py", "watch", str(job_id), "--interval", "0.02"],
        stdout=subprocess.PIPE, text=True)
    assert f"job {job_id}  [........................] 0/0 Created" in watching.stdout.readline()
    start_handler("--once", "--module", "sample_jobs")
    lines = watching.communicate(timeout=20)[0].splitlines()
    assert watching.returncode == 0
    half = next(line for line in lines if "[############............] 2/4 Running" in line)
    assert "/s  " in half
    assert " left  sleep" in half
    assert "[########################] 4/4 Finished" in lines[-1]


def test_output_fits_the_terminal_and_is_plain_in_a_pipe(ran, dsn):
    done = run("list", env=os.environ | {"COLUMNS": "60"})
    assert max(map(len, done.stdout.splitlines())) <= 60
    assert "\x1b" not in done.stdout


def test_states_are_coloured_on_a_terminal_only(monkeypatch):
    rows = tables.table(["state", "n"], [("Failed", 1), ("Created", 2)])
    assert "\x1b" not in rows
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert "\x1b[31mFailed\x1b[0m" in tables.table(["state", "n"], [("Failed", 1), ("Created", 2)])
    monkeypatch.setenv("NO_COLOR", "1")
    assert tables.table(["state", "n"], [("Failed", 1), ("Created", 2)]) == rows


def test_a_closed_pipe_is_no_error(ran, dsn):
    done = subprocess.run(f"{sys.executable} {ROOT}/jobctl.py list --json | head -1",
                          shell=True, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("[\n", "")


@pytest.mark.parametrize(("args", "text"), [
    (["lsit"], "invalid choice: 'lsit'"), (["show", "one"], "invalid int value: 'one'"),
    (["list", "-q"], "-q"),
    (["prune", "--older-than", "long"], "'long' is no length of time; write 90d"),
    (["list", "--state", "Paused"], "invalid choice: 'Paused'"),
    (["create", "Alarm Calculation", "-p", "start"], "write key=value for a string or key:=json"),
    (["create", "Alarm Calculation", "-p", "start:=x"], "what follows := is not JSON"),
    (["create", "Alarm Calculation", "--run-after", "soon"], "write YYYY-MM-DD HH:MM:SS"),
    (["list", "--since", "soon"], "write YYYY-MM-DD HH:MM:SS"),
    (["types", "--module", "nix"], "No module named 'nix'"),
    (["list", "--limit", str(2**63)], f"is not a whole number from 1 to {2**63 - 1}"),
    (["show", "1", "--steps", str(2**63)], f"is not a whole number from 1 to {2**63 - 1}"),
    (["list", "--since", "1001y"], "'1001y' is longer than 1000 years"),
    (["stats", "--since", "9999999999h"], "'9999999999h' is longer than 1000 years"),
    (["prune", "--older-than", "300000 months"], "is longer than 1000 years"),
    (["create", "T", "--run-after", "3000-01-01 00:00:00"], "is not in the years 1900 to 2999"),
    (["create", "T", "--priority", "40000"], "'40000' is no whole number from -32768 to 32767"),
    (["create", "T", "-d", "caf\udce9"], r"'caf\udce9' is not UTF-8"),
    (["list", "--interval", "1e7"], "is not a number of seconds above 0 and below 1000000"),
])
def test_wrong_usage_is_status_2(usage, args, text):
    assert text in usage(*args)


def test_a_missing_database_or_table_is_status_3(dsn, conn, ctl, tmp_path):
    done = run("list", "--dsn", f"host={tmp_path}")
    assert (done.returncode, "cannot reach the database" in done.stderr) == (3, True)
    conn.execute("DROP TABLE job_steps CASCADE")
    assert "run `python jobctl.py init`" in ctl("list", expect=3)


# Schedules.

def test_a_schedule_is_added_listed_switched_and_removed(ctl, conn):
    assert ctl("schedule", "add", "Alarm Calculation", "--every", "1 month",
               "--start", "2026-03-01 00:00:00Z", "--delay", "2h", "-d", "monthly",
               NIGHTLY) == "1\n"
    row = json.loads(ctl("schedule", "list", "--json"))[0]
    assert (row["every"], row["delay"], row["enabled"]) == ("1 mon", "02:00:00", True)
    assert "monthly" in ctl("schedule", "list")
    for action, enabled in (("disable", False), ("enable", True)):
        assert ctl("schedule", action, 1) == f"schedule 1: {action}d\n"
        assert conn.execute("SELECT enabled FROM job_schedules").fetchone()["enabled"] is enabled
    assert ctl("schedule", "remove", 1) == "schedule 1: removed\n"
    assert "there is no schedule 1" in ctl("schedule", "remove", 1, expect=1)


@pytest.mark.parametrize(("name", "parameters", "text"), [
    ("Alarm Calculation", '{"object_names": [], "alarm_ids": [111]}',
     "$.object_names: [] should be non-empty"),
    ("Alarm Calculation", "{}", "'alarm_ids' is a required property"),
    ("Alarm", NIGHTLY, "there is no job type 'Alarm'"),
])
def test_a_schedule_that_does_not_fit_is_refused(ctl, conn, name, parameters, text):
    refused = ctl("schedule", "add", name, parameters, "--every", "1d",
                  "--start", "2026-03-01 00:00:00Z", expect=1)
    assert text in refused
    assert conn.execute("SELECT count(*) FROM job_schedules").fetchone()["count"] == 0


# doctor.

@pytest.fixture
def findings(ctl, conn):
    """What doctor says after some statements; it must have said nothing before."""
    conn.execute("DELETE FROM job_types WHERE name NOT IN (SELECT unnest(%s::text[]))",
                 [["Alarm Calculation", "Bazefield Tag Delete", "Bazefield Insert Allocation"]])
    for name in [n for n in jobs.JOB_TYPES if n not in jobctl.handler.JOB_MODULES]:
        control.write_types(conn, [name])

    def findings(*statements):
        assert ctl("doctor") == "all is well\n"
        for statement in statements:
            conn.execute(statement)
        return ctl("doctor", expect=1)
    return findings


A_JOB = ("INSERT INTO job_instances (job_type_id, description) "
         "SELECT id, 'x' FROM job_types WHERE name = 'Noop'")


@pytest.mark.parametrize(("statements", "text"), [
    (["CREATE OR REPLACE FUNCTION job_schema_version() RETURNS int LANGUAGE sql AS 'SELECT 0'"],
     "schema: version 0 is older than these files' 2: python jobctl.py init"),
    (["CREATE OR REPLACE FUNCTION job_schema_version() RETURNS int LANGUAGE sql AS 'SELECT 9'"],
     "schema: version 9 is newer"),
    (["INSERT INTO job_types (name) VALUES ('Gone')"], "types: no file here provides 'Gone'"),
    (["DELETE FROM job_types WHERE name = 'Noop'"],
     "types: 'Noop' not in job_types: python jobctl.py init"),
    ([A_JOB, "UPDATE job_instances SET worker_id = 4711"],
     "orphans: the workers of jobs 1 are dead"),
    ([A_JOB, "UPDATE job_instances SET description = 'Latest'"],
     'waiting: 1 jobs of \'Noop\' have "test"'),
    ([A_JOB, "UPDATE job_types SET max_running = 0"],
     "waiting: 1 jobs of 'Noop', which is paused"),
    ([A_JOB, "UPDATE job_instances SET created = now() - interval '1 h', "
             "run_after = now() - interval '1 h'"],
     "waiting: 1 jobs of 'Noop' for over 10 minutes, and no handler runs"),
    (["INSERT INTO job_types (name) VALUES ('Gone')", A_JOB,
      "UPDATE job_instances SET job_type_id = (SELECT id FROM job_types WHERE name = 'Gone')"],
     "waiting: 1 jobs are of type 'Gone', which no file here provides"),
    (["INSERT INTO job_schedules (job_type_id, every, next_start) "
      "SELECT id, '1 d', now() FROM job_types WHERE name = 'Alarm Calculation'"],
     "schedules: the parameters of schedule 1 do not fit 'Alarm Calculation': $: 'alarm_ids' is a "
     "required property"),
    (["INSERT INTO job_schedules (job_type_id, every, next_start) "
      "SELECT id, '1 h', now() - interval '5 h' FROM job_types WHERE name = 'Noop'"],
     "schedules: schedule 1 is behind"),
    ([A_JOB, "UPDATE job_instances SET state = 'Running', started = now(), worker_id = 1",
      "INSERT INTO job_steps (job_instance_id, position, name, state, started) "
      "VALUES (1, 1, 'slow', 'Running', now() - interval '61 min')"],
     "steps: step 'slow' of job 1 runs since"),
    (["ALTER TABLE feature_values SET (autovacuum_enabled = off)",  # it might come in between
      "INSERT INTO feature_values "
      "SELECT 1, 1, now() + n * interval '1 s', n FROM generate_series(1, 200000) n",
      "ANALYZE feature_values"], "feature_values: only 0% of"),
    (["DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET TimeZone = %L', current_database(), "
      "'Asia/Tokyo'); END $$"],
     "zone: the database shows times in Asia/Tokyo, jobs mean UTC"),
    (["DROP TABLE job_workers CASCADE"], "schema: table job_workers is missing: python jobctl.py"),
    (["ALTER TABLE job_instances ENABLE REPLICA TRIGGER job_instances_created"],
     "trigger job_instances.job_instances_created is not as in schema.sql: python jobctl.py init"),
])
def test_doctor_finds(findings, conn, statements, text):
    assert text in findings(*statements)
    conn.execute("DO $$ BEGIN EXECUTE format('ALTER DATABASE %I RESET TimeZone', "
                 "current_database()); END $$")


def test_doctor_finds_a_pooler_that_shares_sessions(dsn):
    """Behind PgBouncer in transaction mode two connections take turns on one server session."""
    with perfdb.connect(dsn) as one, perfdb.connect(dsn) as other:
        assert list(doctor.pooler(one, other)) == []
        assert "sessions are shared" in next(doctor.pooler(one, one))


def test_doctor_finds_an_old_transaction_and_a_full_server(dsn, conn, monkeypatch):
    monkeypatch.setattr(doctor, "OLD_TRANSACTIONS_SQL",
                        doctor.OLD_TRANSACTIONS_SQL.replace("1 hour", "0 s"))
    monkeypatch.setattr(doctor, "MOST_CONNECTIONS", 0.001)
    with perfdb.connect(dsn) as other, other.transaction():
        other.execute("SELECT 1")
        pid = other.info.backend_pid
        wait_for(lambda: any(f"session {pid}" in line for line in doctor.old_transactions(conn)))
        assert "are in use" in next(doctor.connections(conn))


def test_doctor_finds_a_clock_that_is_off(conn, monkeypatch):
    now = (datetime.now(UTC) - timedelta(seconds=90)).timestamp()
    monkeypatch.setattr(doctor.time, "time", lambda: now)
    assert "clock: the server's is +90 s off" in next(doctor.clock(conn))
