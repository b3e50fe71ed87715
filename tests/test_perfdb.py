"""A session owes nothing to its database; unfit databases are refused; what a time means."""

import os
from datetime import UTC, datetime

import embedded_pg
import psycopg
import pytest
import sample_jobs  # noqa: F401  its types
from pooler import Pooler, pgbouncer
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo

import control
import jobctl
import perfdb
from worker import Worker

ODD_DEFAULTS = {
    "default_transaction_isolation": "serializable", "DateStyle": "German",
    "IntervalStyle": "iso_8601", "TimeZone": "Asia/Tokyo", "statement_timeout": "77ms",
    "lock_timeout": "77ms", "jit": "on",
    "idle_session_timeout": "77ms", "idle_in_transaction_session_timeout": "77ms",
    "extra_float_digits": "-3", "client_encoding": "LATIN1", "standard_conforming_strings": "off",
    "quote_all_identifiers": "on"}


@pytest.fixture
def set_default(dsn):
    """Set a default of the test's database; all are forgotten afterwards."""
    name = sql.Identifier(conninfo_to_dict(dsn)["dbname"])

    def set_default(setting, value):
        with psycopg.connect(dsn, autocommit=True) as conn:
            conn.execute(sql.SQL("ALTER DATABASE {} SET {} = {}").format(
                name, sql.Identifier(setting), value))

    yield set_default
    with psycopg.connect(dsn, autocommit=True) as conn:
        conn.execute("SET statement_timeout = 0; SET lock_timeout = 0")
        conn.execute(sql.SQL("ALTER DATABASE {} RESET ALL").format(name))


USUAL = dict.fromkeys(
    ("statement_timeout", "lock_timeout", "idle_session_timeout", "transaction_timeout",
     "idle_in_transaction_session_timeout"), "0") | {
    "default_transaction_isolation": "read committed", "DateStyle": "ISO, YMD", "jit": "off",
    "IntervalStyle": "postgres", "TimeZone": "UTC", "extra_float_digits": "1",
    "client_encoding": "UTF8", "standard_conforming_strings": "on",
    "quote_all_identifiers": "off"}


def settings(connection):
    """Return those of USUAL as they are in this session."""
    return dict(perfdb.query(connection, """
        SELECT n, COALESCE(current_setting(n, true), '0')  -- transaction_timeout before 17
          FROM unnest(%s::text[]) AS n""", [list(USUAL)]))


@pytest.mark.parametrize("change", ["RESET ALL", "SET search_path = x; SET jit = on", None])
def test_a_session_owes_nothing_to_the_defaults_of_its_database(dsn, set_default, change):
    with psycopg.connect(dsn) as conn:
        version = conn.info.server_version
    for setting, value in ODD_DEFAULTS.items():
        set_default(setting, value)
    if version >= 170000:
        set_default("transaction_timeout", "77ms")
    with perfdb.connect(dsn) as connection:
        if change:
            connection.execute(change)
            connection.execute("RESET ALL")
            connection.execute(*perfdb.settlement())
        assert settings(connection) == USUAL
        assert perfdb.query(connection, "SHOW search_path") == [('"$user", public',)]


def test_a_worker_sets_again_what_reset_all_takes_back(dsn, set_default):
    with psycopg.connect(dsn) as conn:
        if conn.info.server_version < 170000:
            pytest.skip("transaction_timeout came with PostgreSQL 17")
    set_default("transaction_timeout", "77ms")
    worker = Worker(dsn)
    for reconnect in (lambda: None, worker.reconnect):
        reconnect()
        worker.lend()  # a job may change anything there
        worker.execute("SELECT 1", {})
        assert settings(worker.connection) == USUAL
    worker.close()


def test_reset_all_returns_to_the_settings(dsn, set_default):
    for setting, value in ODD_DEFAULTS.items():
        set_default(setting, value)
    with perfdb.connect(dsn) as connection:
        connection.execute("SET jit = on")
        connection.execute("RESET ALL")
        assert settings(connection) == USUAL


@pytest.mark.parametrize("how", ["dsn", "PGOPTIONS", "service"])
def test_options_of_ones_own_are_kept(dsn, monkeypatch, tmp_path, how):
    mine = "-c work_mem=7MB -c jit=on"
    if how == "dsn":
        dsn = make_conninfo(dsn, options=mine)
    elif how == "PGOPTIONS":
        monkeypatch.setenv("PGOPTIONS", mine)
    else:
        (tmp_path / "services").write_text(f"[mine]\noptions={mine}\n")
        monkeypatch.setenv("PGSERVICEFILE", str(tmp_path / "services"))
        dsn = make_conninfo(dsn, service="mine")
    with perfdb.connect(dsn) as connection:
        assert perfdb.query(connection, "SHOW work_mem") == [("7MB",)]
        assert settings(connection) == USUAL


def test_results_come_as_python_values_whatever_the_database_shows(dsn, set_default):
    for setting, value in ODD_DEFAULTS.items():
        set_default(setting, value)
    with perfdb.connect(dsn) as connection:
        period, moment, value = perfdb.query(
            connection, "SELECT interval '26:03:00', timestamptz '2026-03-01', 0.1::float8 * 3")[0]
    assert period.total_seconds() == 93780
    assert (moment, value) == (datetime(2026, 3, 1, tzinfo=UTC), 0.1 * 3)


def test_jobs_run_whatever_the_defaults_of_the_database(dsn, conn, set_default, run_handler):
    control.write_types(conn, ["Scripted"])
    job_id = control.create_job(conn, "Scripted", {"steps": ["ok", "sleep", "ok"], "sleep": 0.2})
    for setting, value in ODD_DEFAULTS.items():
        set_default(setting, value)
    run_handler("--once", "--module", "sample_jobs")
    with perfdb.connect(dsn) as connection:
        assert perfdb.query(connection, "SELECT state, attempts FROM job_instances WHERE id = %s",
                            [job_id]) == [("Finished", 1)]
        assert perfdb.query(connection, "SELECT max(attempts) FROM job_steps") == [(1,)]


def test_a_job_that_nobody_can_load_hides_no_other(conn, capsys):
    control.write_types(conn, ["Scripted"])
    conn.execute("INSERT INTO job_instances (job_type_id, description, parameters) "
                 "SELECT id, 'endless', %s::jsonb FROM job_types", ['{"n": %s}' % ("9" * 5000)])
    control.create_job(conn, "Scripted", {"steps": []}, "ordinary")
    for command in ["list"], ["show", "1"], ["list", "--json"], ["show", "1", "--json"]:
        assert jobctl.main(command) == 0
        said = capsys.readouterr().out
        assert "endless" in said
        assert ("ordinary" in said) is (command[0] == "list")


@pytest.mark.parametrize("text", ["9" * 5000, "[" * 1500 + "]" * 1500])
def test_json_that_python_cannot_load_comes_as_its_text(dsn, text):
    with perfdb.connect(dsn) as connection:
        assert perfdb.query(connection, "SELECT %s::jsonb", [text]) == [(text,)]
        assert perfdb.query(connection, "SELECT '{\"n\": 1}'::jsonb") == [({"n": 1},)]


# Unfit databases.

def test_a_database_of_its_own_is_fit(dsn):
    with perfdb.connect(dsn) as connection:
        perfdb.refuse_unfit(connection, dsn="host=/nowhere")  # needs no second connection


@pytest.mark.parametrize("shared", [True, False])
def test_a_pooler_that_shares_sessions_is_refused(dsn, server, shared):
    if not conninfo_to_dict(dsn)["host"].startswith("/"):
        pytest.skip("the stand-in wants the server's Unix socket")
    with Pooler(dsn, shared) as pooler, perfdb.connect(pooler.dsn) as connection:
        if shared:
            with pytest.raises(perfdb.UnfitDatabase, match="pool_mode = session"):
                perfdb.refuse_unfit(connection, pooler.dsn)
        else:
            perfdb.refuse_unfit(connection, pooler.dsn)


@pytest.mark.parametrize("extra", ["", "ignore_startup_parameters = options"])
@pytest.mark.parametrize("mode", ["session", "transaction", "statement"])
def test_pgbouncer(dsn, mode, extra):
    with pgbouncer(dsn, f"pool_mode = {mode}\n{extra}") as dsn, perfdb.connect(dsn) as connection:
        if mode == "session":
            connection.execute("SET jit = on")
            connection.execute("RESET ALL")
            connection.execute(*perfdb.settlement())
            assert settings(connection) == USUAL
            perfdb.refuse_unfit(connection, dsn)
        else:
            with pytest.raises(perfdb.UnfitDatabase, match="pool_mode = session"):
                perfdb.refuse_unfit(connection, dsn)


def test_a_pooler_without_a_second_session_has_given_us_a_whole_one(dsn, monkeypatch):
    monkeypatch.setattr(perfdb, "PROBE_SECONDS", 0.05)
    settings = "pool_mode = session\ndefault_pool_size = 1"
    with pgbouncer(dsn, settings) as dsn, perfdb.connect(dsn) as connection:
        perfdb.refuse_unfit(connection, dsn)


@pytest.fixture
def other_database(server, dsn):
    """Make a database in another encoding; it is dropped after the test."""
    made = []

    def make(encoding):
        made.append(f"{conninfo_to_dict(dsn)['dbname']}_{encoding.lower()}")
        with psycopg.connect(server.dsn(), autocommit=True) as admin:
            admin.execute(sql.SQL(
                "CREATE DATABASE {} TEMPLATE template0 ENCODING {} LOCALE 'C'").format(
                sql.Identifier(made[-1]), encoding))
        return server.dsn(made[-1])

    yield make
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        for name in made:
            admin.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))


def test_sql_ascii_is_refused_with_what_to_do(other_database):
    with (perfdb.connect(other_database("SQL_ASCII")) as connection,
          pytest.raises(perfdb.UnfitDatabase, match="ENCODING 'UTF8' TEMPLATE template0")):
        perfdb.refuse_unfit(connection)


def test_a_standby_is_refused_with_what_to_do(capsys):
    if os.environ.get("PERFDB_TEST_DSN"):
        pytest.skip("makes a standby of a server of its own: unset PERFDB_TEST_DSN")
    with embedded_pg.Server({"fsync": "off"}) as server:
        assert jobctl.main(["init", "--dsn", server.dsn()]) == 0
        (server.directory / "data" / "standby.signal").touch()
        server.restart("fast")
        with (perfdb.connect(server.dsn()) as connection,
              pytest.raises(perfdb.UnfitDatabase, match="target_session_attrs=read-write")):
            perfdb.refuse_unfit(connection)
        assert jobctl.main(["create", "Noop", "--dsn", server.dsn()]) == 3
        assert "this server is a hot standby" in capsys.readouterr().err


@pytest.mark.parametrize(("encoding", "stored"), [
    ("LATIN1", "é ? ? ?"), ("LATIN9", "é € ? ?"), ("WIN1252", "é € ? ?"), ("EUC_JP", "? ? 風 ?"),
    ("UTF8", "é € 風 \N{REPLACEMENT CHARACTER}")])
def test_any_text_can_be_cleaned_for_any_encoding(other_database, encoding, stored):
    with perfdb.connect(other_database(encoding)) as connection:
        text = perfdb.clean("é € 風 \0", connection)
        if encoding == "EUC_JP":
            text = text.replace("é", "?")  # has a Greek and a Cyrillic alphabet, and this one too
        assert perfdb.query(connection, "SELECT %s", [text]) == [(stored,)]


# Errors.

@pytest.mark.parametrize(("sqlstate", "passing"), [
    ("08006", True), ("40001", True), ("40P01", True), ("53100", True), ("53300", True),
    ("57P01", True), ("57014", True), ("58030", True), ("25006", True), ("25P03", True),
    ("55P03", True), ("22012", False), ("23505", False), ("25001", False), ("42P01", False),
    ("55006", False), ("P0001", False)])
def test_errors_that_say_nothing_about_a_job(dsn, sqlstate, passing):
    with perfdb.connect(dsn) as connection, pytest.raises(psycopg.Error) as exc:
        connection.execute(f"DO $$ BEGIN RAISE SQLSTATE '{sqlstate}'; END $$")
    assert perfdb.is_passing(exc.value) is passing


def test_a_lost_connection_says_nothing_about_a_job(dsn, conn):
    with perfdb.connect(dsn) as connection:
        conn.execute("SELECT pg_terminate_backend(%s, 5000)", [connection.info.backend_pid])
        for _ in "lost", "closed":
            with pytest.raises(psycopg.OperationalError) as exc:
                connection.execute("SELECT 1")
            assert perfdb.is_passing(exc.value)
    with pytest.raises(psycopg.OperationalError) as exc:
        perfdb.connect("host=/nowhere")
    assert perfdb.is_passing(exc.value)
    assert not perfdb.is_passing(ValueError("x"))
    assert not perfdb.is_passing(psycopg.ProgrammingError("x"))


# Time.

@pytest.mark.parametrize(("text", "moment"), [
    ("2026-03-01T00:00:00", datetime(2026, 2, 28, 23, tzinfo=UTC)),
    ("2026-03-01T00:00:00Z", datetime(2026, 3, 1, tzinfo=UTC)),
    ("2026-03-01T00:00:00.000Z", datetime(2026, 3, 1, tzinfo=UTC)),  # as JavaScript writes it
    ("2026-03-01T00:00:00-0300", datetime(2026, 3, 1, 3, tzinfo=UTC)),
    ("2026-03-01 00:00:00-0330", datetime(2026, 3, 1, 3, 30, tzinfo=UTC)),
    ("2026-03-01T00:00:00+05:45", datetime(2026, 2, 28, 18, 15, tzinfo=UTC)),
])
def test_times_as_front_ends_write_them(monkeypatch, text, moment):
    monkeypatch.setenv("PERFDB_TIMEZONE", "Europe/Madrid")
    assert perfdb.parse_time(text) == moment


@pytest.mark.parametrize("text", [
    "2026-03-01T00:00", "2026-03-01t00:00:00", "2026-03-01  00:00:00", "2026-03-01T00:00:00.5Z",
    "20260301T000000", "2026-03-01T00:00:00-03", "2026-03-01T00:00:00 Z", "2026-W09-7T00:00:00",
    "2026-03-01T00:00:00.Z", "now"])
def test_other_texts_are_refused_with_what_is_accepted(text):
    with pytest.raises(ValueError, match="write YYYY-MM-DD HH:MM:SS or YYYY-MM-DDTHH:MM:SS"):
        perfdb.parse_time(text)
