"""What is not a job's fault is not blamed on it, and nothing of it stops the handler."""

import contextlib
import itertools
import multiprocessing
import socket
import threading

import pytest
import sample_jobs  # noqa: F401  registers its types
from helpers import wait_for
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import control
import handler

# A site's own trigger, which refuses what it is told to, at first or always.
REFUSE_SQL = """
CREATE SEQUENCE tries;
CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF {when} THEN
        {what}
    END IF;
    RETURN NEW;
END $$;
CREATE TRIGGER site BEFORE {event} FOR EACH ROW EXECUTE FUNCTION refuse();
"""
FIRST_THREE = "nextval('tries') <= 3"


@pytest.fixture
def refuse(conn):
    def refuse(event, what="RAISE disk_full;", when=FIRST_THREE):
        conn.execute(REFUSE_SQL.format(event=event, what=what, when=when))
    return refuse


@pytest.fixture
def ask(conn):
    control.write_types(conn, ["Noop", "Transactional"])
    conn.execute("CREATE TABLE trace (job_id bigint, step_id bigint)")

    def ask(*steps, **options):
        if not steps:
            return control.create_job(conn, "Noop", {}, **options)
        return control.create_job(conn, "Transactional", {"steps": list(steps)}, **options)
    return ask


def without_waiting(looking):
    """Let `looking`, a JobHandler, not wait between its tries, and not try for ever."""
    left = iter(range(500))
    looking._sleep = lambda *_: next(left) < 0
    return looking


@pytest.fixture
def run_once(dsn):
    return lambda: without_waiting(handler.JobHandler(dsn, once=True)).run()


@pytest.fixture
def jobs_are(conn):
    return lambda: [(row["state"], row["attempts"], row["comment"]) for row in
                    conn.execute("SELECT state, attempts, comment FROM job_instances ORDER BY id")]


@pytest.mark.parametrize(("event", "what"), [
    *itertools.product(["UPDATE OF worker_id ON job_instances", "INSERT ON job_steps",
                        "UPDATE ON job_steps", "UPDATE OF finished ON job_instances"],
                       ["disk_full", "serialization_failure"]),
    *itertools.product(["UPDATE ON job_steps"],
                       ["too_many_connections", "deadlock_detected", "admin_shutdown",
                        "read_only_sql_transaction"])])
def test_an_error_that_says_nothing_about_the_job_is_tried_again(ask, refuse, run_once, conn,
                                                                 jobs_are, event, what):
    ask("ok", "ok")
    ask("ok")
    refuse(event, f"RAISE {what};")
    assert run_once() == handler.OK
    assert jobs_are() == [("Finished", 1, None)] * 2
    assert conn.execute("SELECT count(*) AS rows, count(DISTINCT step_id) AS steps "
                        "FROM trace").fetchone() == {"rows": 3, "steps": 3}
    assert conn.execute("SELECT DISTINCT attempts FROM job_steps").fetchall() == [{"attempts": 1}]


def test_what_a_step_itself_met_stays_its_failure(ask, run_once, jobs_are):
    ask("ok", "disk full")
    assert run_once() == handler.JOBS_FAILED
    assert jobs_are() == [("Failed", 1, "1 (50.00%) steps failed")]


def test_a_job_whose_end_the_site_refuses_does_not_keep_the_others(ask, refuse, run_once,
                                                                   jobs_are):
    bad = ask("ok", priority=9)
    ask("ok")
    refuse("UPDATE OF finished ON job_instances", "RAISE 'not on my watch';",
           f"NEW.id = {bad} AND NEW.finished IS NOT NULL")
    run_once()
    assert jobs_are()[1] == ("Finished", 1, None)
    assert jobs_are()[0][0] in ("Queued", "Running")  # in nobody's hand, or an orphan


def test_a_job_whose_next_step_is_taken_away_goes_on_with_the_others(ask, run_once, conn):
    control.write_types(conn, ["Meddling"])
    job_id = control.create_job(conn, "Meddling", {
        "steps": ["DELETE FROM job_steps WHERE position = 2", "SELECT 2", "SELECT 3"]})
    assert run_once() == handler.OK
    assert conn.execute("SELECT state FROM job_instances WHERE id = %s",
                        [job_id]).fetchone() == {"state": "Finished"}
    assert [row["position"] for row in conn.execute(
        "SELECT position FROM job_steps WHERE state = 'Finished' ORDER BY position")] == [1, 3]


def test_housekeeping_fails_alone(ask, refuse, conn, dsn, run_handler, jobs_are):
    """A schedule whose INSERT is refused, an orphan not to be put back, types not written."""
    orphan = ask()
    conn.execute("UPDATE job_instances SET worker_id = 4711 WHERE id = %s", [orphan])
    other = ask()
    conn.execute("UPDATE job_instances SET worker_id = 4712 WHERE id = %s", [other])
    conn.execute("INSERT INTO job_schedules (job_type_id, description, every, next_start) "
                 "SELECT id, 'owed', '1 day', now() - interval '3 days' "
                 "FROM job_types WHERE name = 'Noop'")
    ask()
    refuse("INSERT OR UPDATE ON job_instances", "RAISE 'not on my watch';",
           f"NEW.description = 'owed' OR NEW.id = {orphan}")
    done = run_handler("--once", "--module", "sample_jobs")
    assert [state for state, *_ in jobs_are()] == ["Created", "Finished", "Finished"]
    assert done.stderr.count("not on my watch") == 2  # the schedule, the orphan: each once
    assert "recovery: failed, the jobs go on" in done.stderr


def test_what_is_wrong_is_said_once_and_again_when_it_changes(dsn, caplog):
    looking = handler.JobHandler(dsn)
    for pid in range(1000):
        looking._say("database", f"connection to server failed, pid {pid}")
    looking._say("recovery", "failed")
    looking._say("database", "the database system is starting up")
    assert len(caplog.records) == 3


class StartingUp(multiprocessing.get_context("fork").Process):
    """A port that answers as a server that starts up, so many times, and then is the server.

    A process, because libpq's ping lets no other thread of ours run.
    """

    def __init__(self, times, socket_path):
        super().__init__(daemon=True)
        self.times, self.socket_path = times, socket_path
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]

    def run(self):
        for n in itertools.count():
            client, _ = self.listener.accept()
            if n < self.times:
                client.recv(8192)
                fields = b"SFATAL\0VFATAL\0C57P03\0Mthe database system is starting up\0\0"
                client.sendall(b"E" + (len(fields) + 4).to_bytes(4, "big") + fields)
                client.close()
                continue
            server = socket.socket(socket.AF_UNIX)
            server.connect(self.socket_path)
            for source, target in (client, server), (server, client):
                threading.Thread(target=forward, args=[source, target], daemon=True).start()


def forward(source, target):
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def test_a_service_waits_for_a_database_that_starts_up(dsn, conn, ask, jobs_are, caplog):
    ask()
    given = conninfo_to_dict(dsn)
    if not given["host"].startswith("/"):
        pytest.skip("needs the server's socket")
    port = StartingUp(3 * handler.TRIES, f"{given['host']}/.s.PGSQL.{given['port']}")
    port.start()
    service = without_waiting(handler.JobHandler(
        make_conninfo(dsn, host="127.0.0.1", port=port.port, sslmode="disable",
                      gssencmode="disable"),
        limit=Limit(1)))
    assert service.run() == handler.OK
    assert jobs_are() == [("Finished", 1, None)]
    port.kill()
    assert len([r for r in caplog.records if "starting up" in r.message]) == 1


class Limit:
    """As multiprocessing.Value, for one process."""

    def __init__(self, value):
        self.value = value

    def get_lock(self):
        return contextlib.nullcontext()


def test_an_idle_worker_writes_nothing(dsn, conn, start_handler):
    """Looks at the database again and again, and uses no transaction id."""
    start_handler("--poll", "0.1")
    seen = wait_for(lambda: conn.execute(
        "SELECT a.pid, a.query_start FROM pg_stat_activity a "
        "JOIN job_workers w ON w.backend_pid = a.pid "
        "WHERE a.query LIKE '%candidate%'").fetchone())  # a claim: it is introduced by now
    next_sql = "SELECT pg_snapshot_xmax(pg_current_snapshot())::text AS next"
    before = conn.execute(next_sql).fetchone()
    for _ in range(5):
        seen = wait_for(lambda seen=seen: conn.execute(
            "SELECT pid, query_start FROM pg_stat_activity "
            "WHERE pid = %(pid)s AND query_start > %(query_start)s",
            seen).fetchone())
    assert conn.execute(next_sql).fetchone() == before
