"""Fixtures: a PostgreSQL for the run, an empty database for each test, handlers in it.

The server is our own (embedded_pg.py), or the one PERFDB_TEST_DSN names, whose user must
be allowed to create databases; tests that restart the server are then skipped.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import embedded_pg
import psycopg
import pytest
from helpers import wait_for as wait_for  # for tests that import it from here
from psycopg import sql
from psycopg.conninfo import make_conninfo
from psycopg.rows import dict_row

pytest_plugins = ["bazefield_fixtures"]

TESTS = Path(__file__).parent
ROOT = TESTS.parent
TEST_DSN = os.environ.get("PERFDB_TEST_DSN", "")

HANDLER_SECONDS = 60  # a test's handler has little to do

# Tests end PostgreSQL's processes, never the machine: what a process has written the kernel
# keeps, so nothing is lost without fsync, and a database is made twice as fast.
SERVER_SETTINGS = {"fsync": "off", "full_page_writes": "off"}

# A name of our own, so that two runs may share the server of PERFDB_TEST_DSN.
DATABASE = f"perfdb_test_{secrets.token_hex(4)}"
DATABASE_NUMBERS = itertools.count(1)


class GivenServer:
    """The server of PERFDB_TEST_DSN: like `embedded_pg.Server`, but not ours to restart."""

    def dsn(self, dbname: str = "", **extra: Any) -> str:
        return make_conninfo(TEST_DSN, **({"dbname": dbname} if dbname else {}) | extra)

    @property
    def pid(self) -> NoReturn:
        pytest.skip("needs a server of its own: unset PERFDB_TEST_DSN")

    def restart(self, mode: str = "immediate") -> NoReturn:
        pytest.skip("restarts the server: unset PERFDB_TEST_DSN")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Start from a clean environment, and leave nothing in the shared temporary directory."""
    for name in list(os.environ):
        if (name.startswith(("PERFDB_", "BAZEFIELD_", "PG"))
                and not name.startswith("PERFDB_TEST_")):
            del os.environ[name]
    if config.option.basetemp is None:
        config.option.basetemp = tempfile.mkdtemp(prefix="perfdb-test-")
        config.add_cleanup(lambda: shutil.rmtree(config.option.basetemp, ignore_errors=True))
    # A cancelled run ends its handlers too, as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: pytest.exit("terminated", returncode=143))


def pytest_report_header() -> str:
    if TEST_DSN:
        with psycopg.connect(TEST_DSN) as conn:
            return ("server: PERFDB_TEST_DSN, "
                    f"PostgreSQL {conn.info.parameter_status('server_version')}")
    postgres = embedded_pg.find_programs() / "postgres"
    version = subprocess.check_output([postgres, "--version"], text=True).strip()
    return f"server: embedded, {version}"


@pytest.fixture(scope="session")
def server() -> Iterator[embedded_pg.Server | GivenServer]:
    if TEST_DSN:
        yield GivenServer()
    else:
        with embedded_pg.Server(SERVER_SETTINGS) as server:
            yield server


@pytest.fixture(scope="session")
def template(server) -> Iterator[str]:
    """The name of a database with the tables of schema.sql, to copy for each test."""
    schema = (ROOT / "schema.sql").read_text()
    create_database(server, DATABASE, "template0")
    with psycopg.connect(server.dsn(DATABASE), autocommit=True) as conn:
        conn.execute(schema)
        conn.execute(schema)  # must be safe to apply again
    yield DATABASE
    drop_database(server, DATABASE)


# A test that leaves more behind than rows (tables, functions, switched-off triggers) spoils its
# database.
FINGERPRINT_SQL = """
SELECT md5(string_agg(thing, ',' ORDER BY thing))
  FROM (SELECT relname || pg_get_viewdef(oid) FROM pg_class
         WHERE relnamespace = 'public'::regnamespace
         UNION ALL
        SELECT proname || prosrc FROM pg_proc WHERE pronamespace = 'public'::regnamespace
         UNION ALL
        SELECT attname || atttypid::text || attnotnull::text || attidentity::text
          FROM pg_attribute
          JOIN pg_class ON pg_class.oid = attrelid AND relnamespace = 'public'::regnamespace
         UNION ALL
        SELECT pg_get_expr(adbin, adrelid) FROM pg_attrdef
         UNION ALL
        SELECT indkey::text || indisvalid::text FROM pg_index WHERE indexrelid > 16384
         UNION ALL
        SELECT tgname || tgenabled::text FROM pg_trigger
         UNION ALL
        SELECT rulename FROM pg_rewrite WHERE rulename <> '_RETURN'
         UNION ALL
        SELECT conname || pg_get_constraintdef(oid) FROM pg_constraint) AS things(thing)
"""

# A TRUNCATE makes new files for a table and each of its indexes: only where much is to be deleted.
EMPTY_SQL = """
DO $$
DECLARE
    name text;
BEGIN
    SET LOCAL session_replication_role = replica;  -- in any order, and without triggers
    FOR name IN SELECT tablename FROM pg_tables
                 WHERE schemaname = 'public' AND tablename <> 'job_states' LOOP
        IF pg_table_size(name::regclass) > 200000 THEN
            EXECUTE format('TRUNCATE %I CASCADE', name);
        ELSE
            EXECUTE format('DELETE FROM %I', name);
        END IF;
    END LOOP;
    PERFORM setval(sequencename::regclass, 1, false)
       FROM pg_sequences WHERE last_value IS NOT NULL;
    PERFORM pg_stat_reset();
END $$
"""

END_SESSIONS_SQL = ("SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity "
                    "WHERE datname = %s")


@pytest.fixture(scope="session")
def spare(server, template) -> Iterator[list[str]]:
    """Names of databases that are clean and free: emptying one takes a fifth of making one."""
    names: list[str] = []
    yield names
    for name in names:
        drop_database(server, name)


@pytest.fixture
def dsn(server, template, spare, monkeypatch) -> Iterator[str]:
    """A connection string to a database that is the test's own for its time, in PERFDB_DSN too."""
    if spare:
        name = spare.pop()
    else:
        name = f"{template}_{next(DATABASE_NUMBERS)}"
        create_database(server, name, template)
    monkeypatch.setenv("PERFDB_DSN", server.dsn(name))
    yield server.dsn(name)
    if is_clean_again(server, name, template):
        spare.append(name)
    else:
        drop_database(server, name)


def is_clean_again(server, name: str, template: str) -> bool:
    """Empty a database and return whether it is as the template is."""
    with psycopg.connect(server.dsn(), autocommit=True) as admin:
        admin.execute(END_SESSIONS_SQL, [name])
    with psycopg.connect(server.dsn(name), autocommit=True) as conn:
        conn.execute("SET client_min_messages = warning")
        conn.execute("DROP TABLE IF EXISTS trace")  # what the steps of sample_jobs write to
        if conn.execute(FINGERPRINT_SQL).fetchone() != template_fingerprint(server, template):
            return False
        conn.execute(EMPTY_SQL)
    return True


@functools.cache
def template_fingerprint(server, template: str) -> tuple:
    with psycopg.connect(server.dsn(template), autocommit=True) as conn:
        return conn.execute(FINGERPRINT_SQL).fetchone()


@pytest.fixture
def conn(dsn) -> Iterator[psycopg.Connection[dict[str, Any]]]:
    """A connection as the handler opens it: autocommit, rows as dicts."""
    with psycopg.connect(dsn, autocommit=True, row_factory=dict_row) as conn:
        yield conn


@pytest.fixture
def start_handler(dsn, tmp_path):
    """Start `handler.py` with these arguments; it and its workers are killed after the test.

    What it prints goes to the file `log` of the Popen that is returned.
    """
    started = []

    def start(*args: object, env: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        log = tmp_path / f"handler-{len(started) + 1}.log"
        with log.open("wb") as file:
            started.append(popen_handler(args, env, tmp_path, stdout=file, stderr=file))
        started[-1].log = log
        return started[-1]

    yield start
    for process in started:
        kill_group(process)
        print(f"handler {process.args[2:]}, status {process.wait()}:", process.log.read_text())


@pytest.fixture
def run_handler(dsn, tmp_path):
    """Run `handler.py` with these arguments to its end, and check its exit status."""

    def run(*args: object, expect: int = 0,
            env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
        # Files, not pipes: a worker left behind would hold a pipe open, and us.
        with (tempfile.TemporaryFile("w+", dir=tmp_path) as out,
              tempfile.TemporaryFile("w+", dir=tmp_path) as err):
            process = popen_handler(args, env, tmp_path, stdout=out, stderr=err)
            try:
                process.wait(HANDLER_SECONDS)
            except subprocess.TimeoutExpired:
                expect = 0  # the status of the kill is shown below
            finally:
                kill_group(process)
                process.wait()
            out.seek(0)
            err.seek(0)
            done = subprocess.CompletedProcess(process.args, process.returncode,
                                               out.read(), err.read())
        assert done.returncode == expect, (
            f"handler {' '.join(done.args[2:])}: status {done.returncode}, expected {expect}\n"
            f"{done.stdout}{done.stderr}"
        )
        return done

    return run


def popen_handler(args, env, cwd, **files) -> subprocess.Popen[bytes]:
    """Start handler.py away from its own directory, as cron does, in a group of its own."""
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, str(ROOT / "handler.py"), *map(str, args)], cwd=cwd,
        env=os.environ | {"PYTHONPATH": path} | (env or {}),
        stdin=subprocess.DEVNULL, start_new_session=True, **files,
    )


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill `process`, if it still runs, and what it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def create_database(server, name: str, template: str) -> None:
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        query = "CREATE DATABASE {} TEMPLATE {}"
        if conn.info.server_version >= 150000:
            query += " STRATEGY file_copy"  # wal_log, the default, takes twice as long
        conn.execute(sql.SQL(query).format(sql.Identifier(name), sql.Identifier(template)))


def drop_database(server, name: str) -> None:
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        conn.execute(sql.SQL("DROP DATABASE {} WITH (FORCE)").format(sql.Identifier(name)))
