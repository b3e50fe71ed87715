"""handler.py as cron and systemd start it: real processes and signals, exit statuses, the log."""

import signal
import threading

import psycopg
import pytest
import sample_jobs
from helpers import claim, flush_statistics, wait_for

import control
import handler
import jobs
import life
from session import MANY_STEPS, PLANS_SECONDS
from worker import Worker, use_worker

SAMPLES = ("--module", "sample_jobs")


@pytest.fixture
def ask(conn):
    control.write_types(conn, ["Scripted", "Noop"])

    def ask(steps=("ok",), description="night run", **parameters):
        return control.create_job(conn, "Scripted", {"steps": list(steps)} | parameters,
                                  description)
    return ask


@pytest.fixture
def states(conn):
    def states(table="job_instances"):
        return [r["state"] for r in conn.execute(f"SELECT state FROM {table} ORDER BY id")]
    return states


@pytest.mark.parametrize("args", [[], ["--workers", "2"]])
def test_an_empty_run_is_silent_and_well(run_handler, conn, args):
    done = run_handler("--once", *args)
    assert (done.stdout, done.stderr) == ("", "")
    first = conn.execute("SELECT name FROM job_types ORDER BY name").fetchone()
    assert first["name"] == "Alarm Calculation"
    assert conn.execute("SELECT * FROM job_workers").fetchall() == []


@pytest.mark.parametrize("args", [[], ["--workers", "3"]])
def test_once_runs_everything_due_and_exits(run_handler, ask, states, args):
    for _ in range(5):
        ask()
    done = run_handler("--once", *SAMPLES, *args)
    assert (done.stdout, done.stderr) == ("", "")
    assert states() == ["Finished"] * 5


@pytest.mark.parametrize("args", [[], ["--workers", "2"]])
def test_a_failed_job_is_status_1_and_told(run_handler, ask, states, args):
    ask(["ok", "error"])
    done = run_handler("--once", *SAMPLES, *args, expect=1)
    assert "job=1 step=2 state=Failed name='error': no wind" in done.stderr
    assert "job=1 type='Scripted' state=Failed steps=2 failed=1" in done.stderr


def test_a_refused_request_does_not_stop_the_handler(run_handler, ask, states, conn):
    ask(refuse="unknown object 'LAN-99'")
    conn.execute("UPDATE job_instances SET parameters = '{\"wind\": 3}'")
    ask(refuse="unknown object 'LAN-99'")
    ask()
    done = run_handler("--once", *SAMPLES, expect=1)
    assert states() == ["Failed", "Failed", "Finished"]
    assert done.stderr.count("unknown object 'LAN-99'") == 1
    run_handler("--once", *SAMPLES)  # not taken up again


def test_a_bug_in_a_job_file_fails_its_job_and_nothing_else(run_handler, ask, states, conn):
    control.write_types(conn, ["Buggy"])
    control.create_job(conn, "Buggy", {})
    ask()
    done = run_handler("--once", *SAMPLES, expect=1)
    assert states() == ["Failed", "Finished"]
    assert "RuntimeError: a bug in the job file" in done.stderr  # with its traceback
    comment = conn.execute("SELECT comment FROM job_instances ORDER BY id").fetchone()["comment"]
    assert comment == "Unknown error, please check the logs: a bug in the job file"


def test_verbose_logs_a_line_per_job_and_twice_one_per_step(run_handler, ask):
    ask()
    said = run_handler("--once", *SAMPLES, "-v").stderr
    assert "job=1 type='Scripted' state=Finished steps=1 failed=0" in said
    ask()
    assert "job=2 step=2 state=Finished name='ok'" in run_handler("--once", *SAMPLES, "-vv").stderr


def test_a_type_nobody_knows_stays_created(run_handler, ask, states):
    ask()
    run_handler("--once")
    assert states() == ["Created"]


def test_only_the_types_asked_for_are_run(run_handler, ask, states):
    ask()
    run_handler("--once", *SAMPLES, "--type", "Noop")
    assert states() == ["Created"]
    run_handler("--once", *SAMPLES, "--type", "Noop", "--type", "Scripted")
    assert states() == ["Finished"]


def test_test_jobs_are_passed_over_unless_asked_for(run_handler, ask, states):
    ask(description="the laTEST figures")
    run_handler("--once", *SAMPLES)
    assert states() == ["Created"]
    run_handler("--once", *SAMPLES, "--with-tests")
    assert states() == ["Finished"]


@pytest.mark.parametrize("args", [[], ["--workers", "4"]])
def test_limit_bounds_the_jobs_of_all_workers(run_handler, ask, states, args):
    for _ in range(6):
        ask()
    run_handler("--once", *SAMPLES, "--limit", "3", *args)
    assert sorted(states()) == ["Created"] * 3 + ["Finished"] * 3


@pytest.mark.parametrize(("args", "text"), [
    (["--workers", "0"], "'0' is not a whole number from 1"),
    (["--limit", "-1"], "'-1' is not a whole number from 1"),
    (["--poll", "nan"], "'nan' is not a number of seconds above 0"),
    (["--type", "Alarm"], "--type: unknown 'Alarm'; known: 'Alarm Calculation'"),
    (["--module", "no_such_file"],
     "module 'no_such_file' cannot be loaded: ModuleNotFoundError: No module named"),
    (["--dsn", "nonsense"], "no libpq connection string"),
    (["--dsn", "password=s3cret host"], "no libpq connection string"),
    (["--onec"], "unrecognized arguments"),
])
def test_wrong_usage_is_status_2_and_says_what_is_right(run_handler, args, text):
    done = run_handler("--once", *args, expect=2)
    assert text in done.stderr
    assert "s3cret" not in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unknown_zone_is_status_2(run_handler):
    done = run_handler("--once", expect=2, env={"PERFDB_TIMEZONE": "Mars/Base"})
    assert "PERFDB_TIMEZONE='Mars/Base'" in done.stderr


def test_a_database_that_is_down_is_status_3(run_handler, tmp_path):
    done = run_handler("--once", "--dsn", f"host={tmp_path}", expect=3)
    assert "cannot reach the database" in done.stderr
    assert "PERFDB_DSN" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_database_without_the_tables_is_status_3(run_handler, conn):
    conn.execute("DROP TABLE job_workers CASCADE")
    done = run_handler("--once", expect=3)
    assert "the tables are missing: run `python jobctl.py init`" in done.stderr


def test_a_refused_password_is_status_3_and_not_shown(run_handler, server, conn):
    if not hasattr(server, "restart"):
        pytest.skip("needs our own pg_hba.conf")
    conn.execute("DO $$ BEGIN CREATE ROLE locked_out LOGIN PASSWORD 'right'; "
                 "EXCEPTION WHEN duplicate_object THEN END $$")
    dsn = psycopg.conninfo.make_conninfo(conn.info.dsn, user="locked_out", password="s3cret")
    done = run_handler("--once", "--dsn", dsn, expect=3)
    assert "password authentication failed" in done.stderr
    assert "s3cret" not in done.stderr


# Running for ever.

def test_a_new_job_wakes_an_idle_worker(start_handler, ask, states, conn):
    start_handler(*SAMPLES, "--poll", "1000")
    wait_for(lambda: conn.execute(  # the last statement of an idle turn
        "SELECT 1 FROM pg_stat_activity "
        "WHERE application_name LIKE 'performance server worker %%' "
        "AND state = 'idle' AND query LIKE '%%candidate AS (%%'").fetchone())
    ask()
    wait_for(lambda: states() == ["Finished"], timeout=10)


def test_a_missed_notify_is_made_up_by_polling(start_handler, ask, states, conn):
    conn.execute("ALTER TABLE job_instances DISABLE TRIGGER job_instances_created")
    start_handler(*SAMPLES, "--poll", "0.05")
    wait_for(lambda: conn.execute("SELECT 1 FROM job_workers").fetchone())
    ask()
    wait_for(lambda: states() == ["Finished"])


@pytest.mark.parametrize("args", [[], ["--workers", "2"]])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_the_running_step_and_hands_the_job_back(
        start_handler, run_handler, ask, states, conn, signum, args):
    ask(["ok", "sleep", "ok"], sleep=0.3)
    process = start_handler(*SAMPLES, *args)
    wait_for(lambda: states("job_steps")[1:2] == ["Running"])
    process.send_signal(signum)
    assert process.wait(timeout=10) == 0
    assert states("job_steps") == ["Finished", "Finished", "Created"]
    job = conn.execute("SELECT * FROM job_instances").fetchone()
    assert (job["state"], job["worker_id"], job["attempts"]) == ("Queued", None, 0)
    run_handler("--once", *SAMPLES)
    assert states() == ["Finished"]
    assert [r["attempts"] for r in
            conn.execute("SELECT attempts FROM job_steps ORDER BY id")] == [1, 1, 1]


@pytest.mark.parametrize("args", [[], ["--workers", "2"]])
def test_a_second_signal_stops_at_once(start_handler, ask, states, args):
    ask(["sleep"])
    process = start_handler(*SAMPLES, *args)
    wait_for(lambda: states("job_steps") == ["Running"])
    process.send_signal(signal.SIGTERM)
    with pytest.raises(Exception, match="timed out"):
        process.wait(timeout=0.3)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=5)  # the step would sleep for a minute
    assert b"is replaced" not in process.log.read_bytes()


@pytest.mark.parametrize("args", [[], ["--workers", "2"]])
def test_an_idle_handler_stops_at_once(start_handler, conn, args):
    process = start_handler("--poll", "1000", *args)
    wait_for(lambda: conn.execute("SELECT 1 FROM job_workers").fetchone())
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=5) == 0


# Many at once.

def test_concurrent_claims_never_share_a_job(conn, dsn, ask):
    ids = [ask() for _ in range(60)]
    barrier, taken = threading.Barrier(4), []

    def work():
        worker = Worker(dsn)
        barrier.wait()
        while job := claim(worker, "Scripted"):
            taken.append(job.id)
        worker.close()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    assert sorted(taken) == ids


def test_overlapping_runs_share_the_work(start_handler, ask, states, conn):
    for _ in range(40):
        ask(["ok"] * 5)
    runs = [start_handler("--once", *SAMPLES) for _ in range(3)]
    assert [run.wait(timeout=30) for run in runs] == [0, 0, 0]
    assert states() == ["Finished"] * 40
    assert conn.execute("SELECT max(attempts), count(*) FROM job_steps").fetchone() == {
        "max": 1, "count": 200}


@pytest.mark.parametrize("limit", [1, 3])
def test_no_more_jobs_of_a_type_run_than_may(start_handler, ask, states, conn, limit):
    """Each step notes how many are running; the workers all start at once."""
    conn.execute("UPDATE job_types SET max_running = %s WHERE name = 'Scripted'", [limit])
    conn.execute("CREATE TABLE seen (running int)")
    conn.execute("""
        CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            INSERT INTO seen SELECT count(*) FROM job_instances WHERE worker_id IS NOT NULL;
            RETURN NULL;
        END $$""")
    conn.execute("CREATE TRIGGER note AFTER UPDATE OF worker_id ON job_instances FOR EACH ROW "
                 "WHEN (NEW.worker_id IS NOT NULL) EXECUTE FUNCTION note()")
    for _ in range(30):
        ask(["sleep"], sleep=0.1)  # long enough for the other workers to come
    runs = [start_handler("--once", *SAMPLES, "--workers", "4") for _ in range(2)]
    assert [run.wait(timeout=30) for run in runs] == [0, 0]
    start_handler("--once", *SAMPLES).wait(timeout=30)  # what full runs have left
    assert states() == ["Finished"] * 30
    assert conn.execute("SELECT max(running) FROM seen").fetchone()["max"] == limit


def test_a_paused_type_waits(run_handler, ask, states, conn):
    conn.execute("UPDATE job_types SET max_running = 0 WHERE name = 'Scripted'")
    ask()
    run_handler("--once", *SAMPLES)
    assert states() == ["Created"]


def test_a_long_job_waits_for_the_disk_once_per_step(conn, dsn, server):
    """Commits that wait are those whose WAL their own backend flushes: about one per step."""
    worker = Worker(dsn)
    use_worker(worker)
    control.write_types(worker.connection, ["Noop"])
    job = sample_jobs.Noop(control.create_job(worker.connection, "Noop", {"steps": 200}))
    statements = []
    execute = worker.execute
    worker.execute = lambda sql, *args, **more: (
        statements.append(sql) or execute(sql, *args, **more))
    job.run()
    waiting = [sql for sql in statements if "'synchronous_commit', 'off'" not in sql]
    assert len(waiting) == 200
    use_worker(None)
    worker.close()


@pytest.mark.parametrize("more", [0, 1])
def test_the_end_of_a_job_waits_for_the_disk_whether_or_not_another_is_claimed_with_it(dsn, more):
    worker = Worker(dsn, handler.JobHandler(dsn, types=["Noop"]))
    control.write_types(worker.connection, ["Noop"])
    job_id, *_ = control.create_jobs(worker.connection, "Noop", [{}] * (1 + more))
    jobs.take_up(worker, claim(worker, "Noop"))
    with worker.connection.transaction():
        ended = life.end(worker, job_id, life.StepEnd("Finished"), "Finished", None)
        assert (ended.next_job is not None) == bool(more)
        assert worker.connection.execute("SHOW synchronous_commit").fetchone() == ("on",)
    use_worker(None)
    worker.close()


@pytest.fixture
def small_tables(conn, dsn):
    """Return a worker that planned while the tables were small, and what counts whole reads."""
    worker = Worker(dsn)
    use_worker(worker)
    control.write_types(worker.connection, ["Noop"])
    conn.execute("VACUUM job_instances, job_steps")
    control.create_jobs(worker.connection, "Noop", [{"steps": 12}] * 12)
    while job := claim(worker, "Noop"):
        jobs.take_up(worker, job).run()

    def read_whole(table):
        flush_statistics(worker.connection)
        row = conn.execute("SELECT seq_scan FROM pg_stat_user_tables WHERE relname = %s",
                           [table]).fetchone()
        return row["seq_scan"]
    yield worker, read_whole
    use_worker(None)
    worker.close()


def test_a_backlog_that_comes_at_once_is_not_read_whole(small_tables, dsn):
    worker, read_whole = small_tables
    control.create_jobs(worker.connection, "Noop", [{}] * 3000)
    worker._planned -= PLANS_SECONDS  # the last job was long ago
    before = read_whole("job_instances")
    assert claim(worker, "Noop")
    assert read_whole("job_instances") == before


def test_a_long_job_after_short_ones_does_not_read_all_steps_at_each(small_tables):
    worker, read_whole = small_tables
    before = read_whole("job_steps")
    sample_jobs.Noop(control.create_job(worker.connection, "Noop", {"steps": MANY_STEPS})).run()
    assert read_whole("job_steps") - before < 10


def test_the_menu_of_exit_statuses_is_the_documented_one():
    assert (handler.OK, handler.JOBS_FAILED, handler.USAGE, handler.NO_DATABASE) == (0, 1, 2, 3)
