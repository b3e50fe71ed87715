"""jobctl and report asked for odd things: values out of range, torn settings, readers that go."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import jobctl

ROOT = Path(__file__).parents[1]
MARCH = json.dumps({"object_names": ["LAN-01"], "alarm_ids": [111],
                    "start": "2026-03-01 00:00:00", "end": "2026-04-01 00:00:00"})


@pytest.fixture
def ctl(conn, dsn, capsys):
    """Run jobctl in this process; return what it printed, the errors at the end."""
    def ctl(*args, expect=0):
        status = jobctl.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert (status, "Traceback" in err) == (expect, False), err
        return out + err
    ctl("init")
    return ctl


@pytest.mark.parametrize(("dsn", "zone", "said"), [
    ("hunter2", "UTC", "is no libpq connection string"), ("", "Nowhere", "is no time zone"),
    ("postgresql://perf:hunter2@x@db1/p", "UTC", "write %40 for @"),
    ("postgresql://perf:x@hunter2@db1:5432/p", "UTC", "write %40 for @"),
    ("postgresql://perf:hunter2/x@db1/p", "UTC", "%2F for /")])
@pytest.mark.parametrize("command", ["jobctl.py list", "report.py jobs", "plant.py export",
                                     "samples.py load no.csv", "handler.py --once"])
def test_a_connection_string_or_zone_that_makes_no_sense_is_status_2(command, dsn, zone, said):
    done = subprocess.run([sys.executable, *command.split(), "--dsn", dsn], cwd=ROOT, text=True,
                          capture_output=True, env=os.environ | {"PERFDB_TIMEZONE": zone})
    assert (done.returncode, done.stdout, said in done.stderr) == (2, "", True), done.stderr
    assert "hunter2" not in done.stderr


@pytest.mark.parametrize("host", ["/no such dir", "/no/x@y", "@abstract", "127.0.0.1,/no/x@y"])
def test_a_directory_or_an_abstract_socket_is_a_host_like_others(host, capsys):
    dsn = f"host='{host}' port={'1,2' if ',' in host else 1}"
    assert jobctl.main(["list", "--dsn", dsn]) == 3
    assert "cannot reach the database" in capsys.readouterr().err


def test_an_unknown_type_is_said_with_the_known_ones(ctl, conn):
    for command in ("list", "retry", "cancel"):
        assert "known: 'Alarm Calculation'" in ctl(command, "--type", "nix", expect=1)


def test_what_the_server_refuses_is_said_in_one_line_and_is_no_lost_database(ctl, conn):
    key = os.urandom(9000).hex()
    said = ctl("create", "Alarm Calculation", MARCH, "--unique-key", key, expect=1)
    assert said.startswith("jobctl: index row requires")
    assert said.count("\n") == 1
    conn.execute("ALTER TABLE job_instances DROP COLUMN window_start CASCADE")
    assert 'column "window_start" does not exist: run `python jobctl.py init`' in ctl(
        "schedule", "list", expect=3)


def test_a_reader_that_goes_away_stops_no_change(ctl, conn):
    conn.execute("INSERT INTO job_instances (job_type_id) "  # more than fill a buffer
                 "SELECT t.id FROM (SELECT min(id) AS id FROM job_types) t, "
                 "generate_series(1, 600)")
    for out, status in (("| true; exit ${PIPESTATUS[0]}", 0), (">/dev/full", 1)):
        conn.execute("UPDATE job_instances SET state = 'Created', finished = NULL")
        done = subprocess.run(["bash", "-c", f"{sys.executable} {ROOT}/jobctl.py cancel "
                                             f"--state Created {out}"], capture_output=True)
        assert done.returncode == status, done
        assert conn.execute("SELECT DISTINCT state FROM job_instances").fetchall() == [
            {"state": "Failed"}]


def test_ids_are_changed_once_and_none_is_too_large(ctl, conn):
    job_id = ctl("create", "Alarm Calculation", MARCH).strip()
    assert ctl("cancel", job_id, job_id) == f"job {job_id} is cancelled\n"
    assert f"there is no job {2**63}" in ctl("retry", job_id, 2**63, "--dry-run")


def test_parameters_may_begin_with_a_byte_order_mark(ctl, tmp_path, monkeypatch):
    (tmp_path / "march.json").write_text(f"\ufeff{MARCH}", encoding="utf-8")
    ctl("create", "Alarm Calculation", f"@{tmp_path}/march.json")
    monkeypatch.setattr(sys, "stdin", (tmp_path / "march.json").open(encoding="utf-8"))
    ctl("create", "Alarm Calculation", "-")
