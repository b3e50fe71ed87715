"""What a site has set up for itself is said in words with what to do; nothing hangs or is lost."""

import contextlib

import conftest
import psycopg
import pytest
import sample_jobs  # noqa: F401  the type Noop
from psycopg.conninfo import conninfo_to_dict

import control
import doctor
import jobctl
import perfdb


@pytest.fixture
def site(conn, dsn):
    """Run statements of the site's administrator; settings of the database are undone."""
    name = conninfo_to_dict(dsn)["dbname"]
    control.write_types(conn, ["Noop"])

    def site(statements):
        conn.execute(statements.replace("DATABASE", f"DATABASE {name}"))

    yield site
    conn.execute("SET default_transaction_read_only = off")
    conn.execute(f"ALTER DATABASE {name} RESET ALL")


def swallow(table):
    """Return statements by which every INSERT into a table goes by without a word."""
    return ("CREATE FUNCTION swallow() RETURNS trigger LANGUAGE plpgsql "
            f"AS 'BEGIN RETURN NULL; END'; CREATE TRIGGER swallow BEFORE INSERT ON {table} "
            "FOR EACH ROW EXECUTE FUNCTION swallow()")


@pytest.mark.parametrize("key", [[], ["--unique-key", "k"]])
def test_a_job_that_goes_by_without_a_word_is_told(site, capsys, key):
    site(swallow("job_instances"))
    assert jobctl.main(["create", "Noop", *key]) == 1
    assert "took no job" + perfdb.GONE_BY.format(table="job_instances") in capsys.readouterr().err


def test_steps_that_go_by_without_a_word_are_told(site, conn, run_handler):
    job_id = control.create_job(conn, "Noop", {"steps": 2})
    site(swallow("job_steps"))
    run_handler("--once", "--module", "sample_jobs", expect=1)
    [job] = conn.execute("SELECT state, comment FROM job_instances WHERE id = %s", [job_id])
    assert job["state"] == "Failed"
    assert job["comment"].startswith("the database took 0 of 2 steps: a trigger or rule")


def test_a_worker_that_goes_by_without_a_word_is_told(site, run_handler):
    site(swallow("job_workers"))
    done = run_handler("--once", "--module", "sample_jobs", expect=3)
    assert "took no worker: a trigger or rule of the site lets an INSERT into job_workers" in (
        done.stderr)
    assert "Traceback" not in done.stderr


def test_a_database_that_refuses_a_statement_has_been_reached(site, conn, run_handler):
    control.create_job(conn, "Noop", {})
    site("CREATE RULE log AS ON UPDATE TO job_instances DO ALSO NOTIFY changed")
    done = run_handler("--once", "--module", "sample_jobs", expect=3)
    assert "refuses what the handler needs, 6 tries: DO ALSO rules" in done.stderr


@pytest.mark.parametrize("command", ["init", "create"])
def test_a_database_that_is_read_only_is_refused_with_what_to_do(site, run_handler, capsys,
                                                                 command):
    site("ALTER DATABASE SET default_transaction_read_only = on")
    done = run_handler("--once", "--module", "sample_jobs", expect=3)
    assert done.stderr.strip().endswith(perfdb.READ_ONLY)
    assert jobctl.main([command, *(["Noop"] if command == "create" else [])]) in (1, 3)
    assert perfdb.READ_ONLY in capsys.readouterr().err


@pytest.mark.parametrize(("where", "urgent"), [("DATABASE", True), ("ROLE ALL IN DATABASE", True),
                                               ("ROLE CURRENT_USER IN DATABASE", False)])
def test_doctor_tells_who_may_write(site, dsn, where, urgent):
    site(f"ALTER {where} SET default_transaction_read_only = on")
    with perfdb.connect(dsn) as connection, perfdb.connect_plainly(dsn) as other:
        findings = doctor.examine(connection, other)
    [said] = [finding for finding in findings if finding.startswith("read only: ")]
    assert (said in doctor.needs_somebody(findings)) == urgent
    site(f"ALTER {where} RESET ALL")


@pytest.mark.parametrize(("change", "found"), [
    ("CREATE FUNCTION no() RETURNS event_trigger LANGUAGE plpgsql AS 'BEGIN RAISE ''no DDL''; "
     "END'; CREATE EVENT TRIGGER no ON ddl_command_start EXECUTE FUNCTION no()",
     "doctor: cannot look for schema: no DDL"),
    ("ALTER TABLE job_steps RENAME TO steps", "schema: table job_steps is missing"),
    ("ALTER TABLE features RENAME TO signals", "schema: table features is missing")])
def test_what_stops_one_check_of_doctor_stops_no_other(site, conn, dsn, change, found):
    control.create_job(conn, "Noop", {}, "latest")
    site(change)
    try:
        with perfdb.connect(dsn) as connection, perfdb.connect_plainly(dsn) as other:
            findings = doctor.examine(connection, other)
    finally:
        conn.execute("DROP EVENT TRIGGER IF EXISTS no")
    assert [one for one in findings if one.startswith(found)], findings
    assert [one for one in findings if one.startswith("waiting: ")], findings


def test_a_table_under_another_name_is_told_by_init(site, capsys):
    site("ALTER TABLE job_steps RENAME TO steps")
    assert jobctl.main(["init"]) == 1
    assert ('"step_position_is_taken_once" already exists: has a table been renamed that has it?'
            in capsys.readouterr().err)


@pytest.fixture
def nobody(server, template):
    """A connection string for a role without rights, to a database without tables."""
    name = f"{template}_bare"
    conftest.create_database(server, name, "template0")
    with psycopg.connect(server.dsn(name), autocommit=True) as admin:
        admin.execute("CREATE SCHEMA perf; CREATE ROLE perf_nobody LOGIN")
    yield server.dsn(name, user="perf_nobody")
    conftest.drop_database(server, name)
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute("DROP ROLE perf_nobody")


@pytest.mark.parametrize(("path", "said"), [
    ("nowhere", "search_path is 'nowhere' and names no schema that is there and that perf_nobody"),
    ("perf", "search_path is 'perf' and names no schema that is there and that perf_nobody"),
    ("pg_catalog", "perf_nobody may make no tables in schema pg_catalog, the first of")])
def test_init_says_where_there_is_no_room_for_tables(nobody, capsys, path, said):
    dsn = psycopg.conninfo.make_conninfo(nobody, options=f"-c search_path={path}")
    assert jobctl.main(["init", "--dsn", dsn]) == 1
    assert said in capsys.readouterr().err


def test_a_database_that_quotes_all_names_is_as_it_should_be(site, capsys):
    site("ALTER DATABASE SET quote_all_identifiers = on")
    assert jobctl.main(["init"]) == 0, capsys.readouterr().err


def test_a_schedule_needs_no_trigger(site, conn, capsys):
    site("ALTER DATABASE SET session_replication_role = replica")
    assert jobctl.main(["schedule", "add", "Noop", "--every", "1d",
                        "--start", "2026-03-01 00:00:00"]) == 0, capsys.readouterr().err
    assert conn.execute("SELECT next_start = first_start AS same FROM job_schedules"
                        ).fetchall() == [{"same": True}]


def test_doctor_outlasts_the_idle_timeout_of_the_database(site, dsn):
    def slow(connection):
        connection.execute("SELECT pg_sleep(0.5)")
        return []
    site("ALTER DATABASE SET idle_session_timeout = '200ms'")
    with (perfdb.connect(dsn) as connection,
          contextlib.closing(perfdb.connect_plainly(dsn)) as other):
        assert doctor.examine(connection, other, [slow]) == []


def test_a_zone_only_the_server_knows_is_not_recommended(site, dsn):
    site("ALTER DATABASE SET TimeZone = '<+05:45>-5:45'")
    with perfdb.connect(dsn) as connection, perfdb.connect_plainly(dsn) as other:
        [said] = doctor.zone(connection, other)
    assert said.endswith("(PERFDB_TIMEZONE): ALTER DATABASE ... SET TimeZone = 'UTC'")
