"""Whatever stands in a row, no command's output moves the terminal of who reads it."""

import re

import pytest
import sample_jobs  # noqa: F401  registers its types

import control
import jobctl

EVIL = "x\x1b[2J\x07\x9b31m\x7f\u202ey"
MOVES = re.compile("[\x01-\x08\x0b-\x1f\x7f-\x9f\u202e]")


@pytest.fixture
def evil_rows(conn):
    """A job that waits and one that has failed, of a type and with texts of that kind."""
    conn.execute("INSERT INTO job_types (name, description) VALUES (%s, %s)", [EVIL, EVIL])
    conn.execute("INSERT INTO job_instances (job_type_id, description, parameters) "
                 "SELECT id, name, jsonb_build_object('a', name) FROM job_types")
    conn.execute("INSERT INTO job_instances (job_type_id, description, parameters, state, "
                 "comment, started, finished) SELECT id, name, '{}', 'Failed', name, now(), now() "
                 "FROM job_types")
    conn.execute("INSERT INTO job_steps (job_instance_id, position, name, state, comment, "
                 "started, finished) SELECT id, 1, comment, 'Failed', comment, now(), now() "
                 "FROM job_instances WHERE state = 'Failed'")
    conn.execute("INSERT INTO job_schedules (job_type_id, description, parameters, every, "
                 "first_start) SELECT id, name, '{}', '1 day', '2026-01-01' FROM job_types")


@pytest.mark.parametrize("command", [
    "list", "list --json", "show 1", "show 2", "show 2 --json", "log 2", "stats", "types",
    "doctor", "schedule list", "cancel --state Created --dry-run",
    "retry --state Failed --dry-run",
])
def test_no_output_holds_a_control_character(evil_rows, capsys, command):
    jobctl.main(command.split())
    shown = capsys.readouterr()
    assert not MOVES.search(shown.out + shown.err)
    assert re.search(r"x(\\x1b|\\u001b)\[2J", shown.out)


def test_the_handlers_log_shows_them_as_text(conn, run_handler):
    control.write_types(conn, ["Scripted"])
    control.create_job(conn, "Scripted", {"steps": ["ok"], "refuse": "wind \x1b[31m too \x9b low"})
    said = run_handler("--once", "--module", "sample_jobs", expect=1).stderr
    assert r"wind \x1b[31m too \x9b low" in said
    assert "\x1b" not in said
