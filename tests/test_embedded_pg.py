"""The private PostgreSQL does its work and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import embedded_pg
import psycopg
import pytest
from helpers import wait_for
from psycopg.conninfo import conninfo_to_dict

PROGRAM = [sys.executable, embedded_pg.__file__]


def query(server, text, dbname="postgres"):
    with psycopg.connect(server.dsn(dbname)) as conn:
        return conn.execute(text).fetchone()[0]


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def own():
    with embedded_pg.Server({"fsync": "off"}) as server:
        yield server


@pytest.fixture
def start_program():
    """Run embedded_pg.py; return its process, the server's directory and the server's pid."""
    started = []

    def start(*args, **kwargs):
        started.append(subprocess.Popen([*PROGRAM, *args], stdout=subprocess.PIPE, text=True,
                                        **kwargs))
        directory = Path(conninfo_to_dict(started[-1].stdout.readline())["host"])
        pid = int((directory / "data" / "postmaster.pid").read_text().split()[0])
        return started[-1], directory, pid

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_two_servers_at_once_are_two_servers_and_then_none():
    with embedded_pg.Server() as one, embedded_pg.Server() as two:
        assert query(one, "SELECT pg_postmaster_start_time()") \
            != query(two, "SELECT pg_postmaster_start_time()")
        assert one.directory != two.directory
        assert query(one, "SHOW listen_addresses") == ""
        assert query(one, "SHOW fsync") == "on"  # the benchmarks rely on it
        assert one.directory.stat().st_mode & 0o777 == 0o700
    for server in one, two:
        assert not server.directory.exists()
        assert not is_running(server.pid)


@pytest.mark.parametrize("mode", ["immediate", "fast"])
def test_restart_keeps_the_data_and_the_socket(own, mode):
    before = own.pid
    with psycopg.connect(own.dsn(), autocommit=True) as conn:
        conn.execute("CREATE TABLE kept AS SELECT 42 AS value")
        own.restart(mode)
        with pytest.raises(psycopg.OperationalError):
            conn.execute("SELECT 1")
    assert own.pid != before
    assert query(own, "SELECT value FROM kept") == 42


def test_a_password_is_asked_of_locked_out_alone(own):
    with psycopg.connect(own.dsn()) as conn:
        conn.execute("CREATE ROLE locked_out LOGIN PASSWORD 'secret'")
    with pytest.raises(psycopg.OperationalError, match="password authentication failed"):
        psycopg.connect(own.dsn(user="locked_out", password="wrong"))
    psycopg.connect(own.dsn(user="locked_out", password="secret")).close()


def test_a_server_that_does_not_start_says_why_and_leaves_nothing(monkeypatch):
    server = embedded_pg.Server({"no_such_setting": "1"})
    with pytest.raises(embedded_pg.ServerError, match="no_such_setting"), server:
        pass
    assert not server.directory.exists()


def test_a_failing_initdb_is_quoted_and_leaves_nothing(tmp_path, monkeypatch):
    """The directory is open to all, as the programs of the system are."""
    programs = embedded_pg.make_directory(reachable_by_others=True)
    try:
        programs.chmod(0o755)
        for name in "initdb", "postgres":
            (programs / name).write_text("#!/bin/sh\necho no space left; exit 1\n")
            (programs / name).chmod(0o755)
        monkeypatch.setenv("PERFDB_TEST_PG", str(programs))
        server = embedded_pg.Server()
        with pytest.raises(embedded_pg.ServerError, match="status 1:\nno space left"), server:
            pass
        assert not server.directory.exists()
    finally:
        embedded_pg.shutil.rmtree(programs)


def test_a_closed_or_long_tmpdir_is_passed_over_and_left_as_it_is(tmp_path, monkeypatch):
    """A home of mode 700 hides what is below it from `nobody`, and stays of mode 700."""
    home = tmp_path / "home"
    deep = home / ("long" * 20)
    deep.mkdir(parents=True)
    home.chmod(0o700)
    parents = [deep, *deep.parents]
    before = [path.stat().st_mode for path in parents]
    monkeypatch.setattr(embedded_pg.tempfile, "tempdir", str(deep))
    with embedded_pg.Server() as server:
        assert home not in server.directory.parents
    assert [path.stat().st_mode for path in parents] == before
    assert list(deep.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL],
                         ids=lambda number: number.name)
def test_nothing_is_left_of_a_program_that_is_ended(start_program, number):
    process, directory, pid = start_program()
    process.send_signal(number)
    process.wait(20)
    wait_for(lambda: not directory.exists(), what=f"the end of {directory}")
    wait_for(lambda: not is_running(pid), what=f"the end of server {pid}")


def test_a_command_gets_the_server_and_passes_its_status_on(tmp_path):
    done = subprocess.run([*PROGRAM, "sh", "-c", 'echo "$PERFDB_DSN"; exit 7'],
                          stdout=subprocess.PIPE, text=True)
    assert done.returncode == 7
    assert not Path(conninfo_to_dict(done.stdout)["host"]).exists()


def test_a_command_is_ended_with_the_program(start_program):
    process, directory, _ = start_program("sh", "-c", 'echo "$PERFDB_DSN"; echo $$; exec sleep 60')
    command = int(process.stdout.readline())
    process.terminate()
    assert process.wait(20) == 128 + signal.SIGTERM
    assert not is_running(command)
    assert not directory.exists()
