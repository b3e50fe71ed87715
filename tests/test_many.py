"""Cancelling and retrying many jobs at once, and what doctor says of failures."""

import json
import shlex

import pytest

import control
import doctor
import handler
import jobctl
import perfdb
from worker import Worker

JOBS = [("Created", "march"), ("Queued", "march"), ("Finished", "april"), ("Failed", "april"),
        ("Failed", "<100%> of May")]


@pytest.fixture
def ctl(conn, dsn, capsys):
    """Run jobctl in this process; return what it printed."""
    def ctl(*args, expect=0):
        status = jobctl.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert (status, "Traceback" in err) == (expect, False), out + err
        return out + err
    handler.load_modules()
    control.write_types(conn)
    return ctl


@pytest.fixture
def jobs(ctl, conn):
    """Five jobs in four states, each with a step."""
    for state, description in JOBS:
        ended = "now()" if state in ("Finished", "Failed") else "NULL"
        conn.execute(f"""
            WITH job AS (
                INSERT INTO job_instances (job_type_id, state, description, started, finished)
                SELECT id, %(state)s, %(description)s, {ended}, {ended} FROM job_types
                 WHERE name = 'Alarm Calculation' RETURNING id)
            INSERT INTO job_steps (job_instance_id, position, name, state, comment, started,
                                   finished)
            SELECT id, 1, 'LAN-01', %(state)s,
                   CASE %(state)s WHEN 'Failed' THEN 'no wind at 50 %%' END, {ended}, {ended}
              FROM job""",
            {"state": state, "description": description})
    return conn


def states(conn):
    return [row["state"] for row in conn.execute("SELECT state FROM job_instances ORDER BY id")]


@pytest.mark.parametrize(("args", "ids"), [
    (["cancel", "--text", "MARCH"], [1, 2]),
    (["cancel", "--type", "Alarm Calculation"], [1, 2]),
    (["cancel", "--state", "Queued", "--since", "1h"], [2]),
    (["cancel", "--since", "2999-01-01 00:00:00"], []),
    (["retry", "--since", "24h"], [4, 5]),
    (["retry", "--text", "no wind at 50 %"], [4, 5]),
    (["retry", "--text", "<100%> of"], [5]),
    (["retry", "--all", "--text", "april"], [3, 4]),
])
def test_jobs_are_chosen_as_list_shows_them(ctl, jobs, args, ids):
    before = states(jobs)
    shown = ctl(*args, "--dry-run")
    assert [int(line.split()[1]) for line in shown.splitlines()[:-1]] == ids
    done = {"cancel": "cancelled", "retry": "retried"}[args[0]]
    assert shown.splitlines()[-1] == f"{len(ids)} jobs would be {done}; nothing was changed"
    assert states(jobs) == before
    ctl(*args)
    pairs = enumerate(zip(before, states(jobs), strict=True), 1)
    assert [n for n, (old, new) in pairs if old != new] == ids


def test_one_refusal_does_not_stop_the_rest(ctl, jobs):
    said = ctl("cancel", 3, 1, 99, 2, "--reason", "storm", expect=1)
    assert "job 1 is cancelled\njob 2 is cancelled\n" in said
    assert "job 3 cannot be cancelled: it is Finished" in said
    assert "there is no job 99" in said
    assert states(jobs)[:3] == ["Failed", "Failed", "Finished"]


def test_a_dry_run_of_ids_says_which_would_be_refused(ctl, jobs):
    said = ctl("retry", 4, 3, 99, "--dry-run")
    assert said == ("job 4 would be retried: Failed, Alarm Calculation, april\n"
                    "job 3 cannot be retried: Finished, Alarm Calculation, april\n"
                    "there is no job 99\n1 jobs would be retried; nothing was changed\n")


@pytest.mark.parametrize("args", [
    ["cancel"], ["retry", "--all"], ["cancel", "1", "--state", "Queued"],
    ["retry", "--since", "soon", "1"]])
def test_neither_or_both_of_ids_and_filters_is_wrong_usage(ctl, args, capsys):
    with pytest.raises(SystemExit) as exc:
        jobctl.main(args)
    assert exc.value.code == 2


# What doctor says.

def findings(dsn, conn, check):
    with perfdb.connect(dsn) as connection:
        return list(doctor.look(check, connection))


def test_failed_jobs_are_named_by_what_their_steps_say(dsn, jobs):
    jobs.execute("UPDATE job_instances SET comment = 'Cancelled: storm' WHERE id = 4")
    jobs.execute("""INSERT INTO object_types (name) VALUES ('t'); INSERT INTO object_models
        (object_type_id, name) SELECT id, 'm' FROM object_types; INSERT INTO objects
        (object_model_id, name) SELECT id, 'LAN-01' FROM object_models;
        UPDATE job_steps SET object_id = (SELECT id FROM objects)""")
    found, = findings(dsn, jobs, doctor.failures)
    assert found.startswith("failed: 1 job of 'Alarm Calculation' failed at 20")
    assert found.endswith(", objects 'LAN-01': no wind at 50 %: mend the cause, then "
                          "python jobctl.py retry 5")


def test_the_command_that_doctor_prints_retries_those_jobs(dsn, ctl, jobs):
    group, = doctor.fetch_failures(jobs)
    assert doctor.retry_command(group) == "python jobctl.py retry 4 5"
    many = doctor.retry_command(group | {"jobs": 99})  # too many to name
    assert ctl(*shlex.split(many)[2:]) == "job 4 is Queued again\njob 5 is Queued again\n"


def test_failures_of_long_ago_are_history(dsn, jobs):
    jobs.execute("UPDATE job_instances SET finished = now() - interval '25 h' "
                 "WHERE finished IS NOT NULL")
    assert findings(dsn, jobs, doctor.failures) == []


def test_a_queue_that_grows_under_live_workers(dsn, jobs):
    jobs.execute("INSERT INTO job_workers (id, host, pid, backend_pid) VALUES (1, 'h', 1, 1)")
    jobs.execute("UPDATE job_instances SET created = now() - interval '29 min', "
                 "run_after = created")
    assert findings(dsn, jobs, doctor.waiting) == []
    jobs.execute("UPDATE job_instances SET created = now() - interval '3 h', "
                 "run_after = now() - interval '3 h'")
    jobs.execute("UPDATE job_types SET max_running = 1")
    assert findings(dsn, jobs, doctor.waiting) == [
        "waiting: 2 jobs of 'Alarm Calculation', the oldest for 3 h, though 1 workers live: "
        "start more, python handler.py --workers N, or raise job_types.max_running, now 1"]


def test_a_schedule_whose_last_windows_failed(dsn, jobs):
    jobs.execute("""
        INSERT INTO job_schedules (id, job_type_id, description, every, first_start, next_start)
        SELECT 7, job_type_id, 'nightly', '1 day', '2026-03-01Z', '2026-03-06Z'
          FROM job_instances LIMIT 1""")
    for day, state in enumerate(["Failed", "Finished", "Failed", "Failed", "Failed"], 1):
        jobs.execute("INSERT INTO job_instances (job_type_id, state, schedule_id, window_start, "
                     "finished) SELECT job_type_id, %s, 7, %s, now() FROM job_instances LIMIT 1",
                     [state, f"2026-03-0{day}Z"])
    assert findings(dsn, jobs, doctor.failed_windows) == [
        "schedules: the last 3 windows of schedule 7 (nightly) failed: mend the cause, then "
        "python jobctl.py retry 8 9 10"]
    jobs.execute("UPDATE job_instances SET state = 'Finished' WHERE id = 10")
    assert findings(dsn, jobs, doctor.failed_windows) == []


def test_the_job_of_a_live_worker_is_no_orphan(dsn, jobs):
    worker = Worker(dsn)
    try:
        jobs.execute("UPDATE job_instances SET worker_id = %s WHERE id = 1", [worker.id])
        jobs.execute("UPDATE job_instances SET worker_id = %s WHERE id = 2", [worker.id ^ 1 << 40])
        assert findings(dsn, jobs, doctor.orphans) == [
            "orphans: the workers of jobs 2 are dead; the next handler takes them up: "
            "python handler.py --once"]
    finally:
        worker.close()


def test_workers_that_run_older_code(dsn, conn):
    import socket
    conn.execute("INSERT INTO job_workers (id, host, pid, backend_pid, started) VALUES "
                 "(1, %(host)s, 11, 1, '2001-01-01'), "
                 "(2, %(host)s, 22, 1, now() + interval '1 day'), "
                 "(3, 'elsewhere', 33, 1, '2001-01-01')", {"host": socket.gethostname()})
    found, = findings(dsn, conn, doctor.old_code)
    assert found.startswith("workers: processes 11 on this host were started before ")


def test_notes_need_nobody(dsn, ctl, conn, monkeypatch):
    conn.execute("CREATE ROLE looks LOGIN; GRANT SELECT ON ALL TABLES IN SCHEMA public TO looks")
    monkeypatch.setenv("PERFDB_DSN", f"{dsn} user=looks")
    try:
        said = ctl("doctor")
        assert said.startswith("note: rights: looks does not see other roles' transactions")
        assert said.count("GRANT pg_read_all_stats TO looks") == 1
        assert ctl("doctor", "--quiet") == ""
        conn.execute("REVOKE SELECT ON job_schedules FROM looks")
        assert "note: rights: cannot look for schedules: permission denied" in ctl("doctor")
    finally:
        conn.execute("DROP OWNED BY looks; DROP ROLE looks")


def test_a_role_that_cannot_compare_the_tables_is_no_alarm(dsn, ctl, conn, monkeypatch):
    conn.execute("CREATE ROLE looks LOGIN; GRANT SELECT ON ALL TABLES IN SCHEMA public TO looks")
    temporary = ("DO $$ BEGIN EXECUTE format('{} ON DATABASE %I {} PUBLIC', current_database()); "
                 "END $$")
    conn.execute(temporary.format("REVOKE TEMPORARY", "FROM"))
    monkeypatch.setenv("PERFDB_DSN", f"{dsn} user=looks")
    try:
        assert "note: schema: not compared with schema.sql" in ctl("doctor")
    finally:
        conn.execute(temporary.format("GRANT TEMPORARY", "TO"))
        conn.execute("DROP OWNED BY looks; DROP ROLE looks")


def test_quiet_says_nothing_when_all_is_well_and_all_else_when_not(ctl, conn):
    assert (ctl("doctor"), ctl("doctor", "--quiet")) == ("all is well\n", "")
    conn.execute("INSERT INTO job_types (name) VALUES ('Gone')")
    assert ctl("doctor", "--quiet", expect=1).startswith("types: no file here provides 'Gone'")
    assert json.loads(ctl("doctor", "--json", expect=1))[0].startswith("types: ")


# Job files that cannot be imported.

@pytest.mark.parametrize(("source", "text"), [
    ("import json\nimport no_such_thing\n", "no_such_thing"), ("x = 1 / 0\n", "division by zero"),
    ("def f(:\n", "line 1")])
def test_a_job_file_that_cannot_be_imported_says_which_line(tmp_path, monkeypatch, capsys,
                                                           source, text):
    (tmp_path / "broken_job.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SystemExit) as exc:
        jobctl.main(["types", "--module", "broken_job"])
    said = capsys.readouterr().err
    assert exc.value.code == 2
    assert text in said
    assert "broken_job.py" in said
    assert "beside jobctl.py" not in said


def test_control_is_what_front_ends_call(jobs):
    assert [job["id"] for job in control.matching_jobs(jobs, states=["Failed"])] == [4, 5]
    assert control.matching_jobs(jobs, []) == []
