"""What jobctl shows: at a terminal of 80 and of 200 columns, in a pipe, and while it changes."""

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

import control
import handler
import jobctl
import tables

ROOT = Path(__file__).parents[1]
LONG = " ".join(["no samples of wind_speed"] * 12)


@pytest.fixture
def ctl(conn, dsn, capsys):
    """Run jobctl in this process; return what it printed."""
    def ctl(*args, expect=0):
        status = jobctl.main([str(arg) for arg in args])
        out, err = capsys.readouterr()
        assert (status, "Traceback" in err) == (expect, False), err
        return out + err
    handler.load_modules()
    control.write_types(conn)
    return ctl


@pytest.fixture
def failed(ctl, conn):
    """A failed job with long texts: its description, and the error of its second step."""
    job_id = conn.execute("""
        INSERT INTO job_instances (job_type_id, state, description, comment, started, finished,
                                   attempts)
        SELECT id, 'Failed', 'Alarms of all turbines of Llano Norte in March',
               '1 (33.33%%) steps failed',
               now() - interval '50 s', now() - interval '15 s', 1
          FROM job_types WHERE name = 'Alarm Calculation' RETURNING id""", {}).fetchone()["id"]
    conn.execute("""
        INSERT INTO job_steps (job_instance_id, position, name, state, comment, started, finished)
        SELECT %(id)s, n, 'LAN-0' || n || ' / alarm 111',
               CASE n WHEN 2 THEN 'Failed' ELSE 'Finished' END,
               CASE n WHEN 2 THEN %(long)s END, now() - (60 - 10 * n) * interval '1 s',
               now() - (50 - 10 * n) * interval '1 s'
          FROM generate_series(1, 3) AS n""", {"id": job_id, "long": LONG})
    return job_id


def at_terminal(columns, *args):
    """Run jobctl at a terminal so wide; return its lines without colours."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    env = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
    process = subprocess.Popen([sys.executable, ROOT / "jobctl.py", *map(str, args)],
                               stdout=slave, stderr=slave, stdin=slave, env=env)
    os.close(slave)
    out = b""
    try:
        while chunk := os.read(master, 65536):
            out += chunk
    except OSError:  # the end of a terminal
        pass
    assert process.wait() == 0, out
    os.close(master)
    return re.sub(r"\x1b\[\d*m", "", out.decode()).splitlines()


def piped(*args):
    env = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    return subprocess.run([sys.executable, ROOT / "jobctl.py", *map(str, args)], check=True,
                          capture_output=True, text=True, env=env).stdout


def test_a_narrow_terminal_keeps_what_matters(failed):
    head, _, row = at_terminal(80, "list")
    assert max(map(len, [head, row])) <= 80
    assert head.split() == ["id", "state", "steps", "age", "description", "comment"]
    assert re.match(r" +1 +Failed +2/3 +\S+ m?s +Alarms of all tur.*… +1 \(33", row), row


def test_a_terminal_of_40_columns_still_has_the_comment(failed):
    head, _, row = at_terminal(40, "list")
    assert re.fullmatch(r" +id +state +age +desc\S+… +comment", head)
    assert re.match(r" +1 +Failed +\S+ m?s +Alarms .*… +1 \(33", row), row
    assert max(map(len, [head, row])) <= 40
    assert max(map(len, at_terminal(40, "show", failed))) <= 40


def test_a_wide_terminal_shows_all(failed):
    head, _, row = at_terminal(200, "list")
    assert "created (UTC)" in head
    for part in ("Alarm Calculation", "Alarms of all turbines of Llano Norte in March", "35.0 s"):
        assert part in row


def test_nothing_is_cut_in_a_pipe(failed, ctl):
    assert LONG in piped("show", failed)
    assert "Alarms of all turbines of Llano Norte in March" in piped("list")


def test_show_gives_the_whole_error_of_a_failed_step_first_and_wrapped(failed):
    lines = at_terminal(80, "show", failed)
    assert max(map(len, lines)) <= 80
    error = next(n for n, line in enumerate(lines) if line.startswith("  step 2 "))
    assert error < next(n for n, line in enumerate(lines) if "created" in line)
    shown = " ".join(line.strip() for line in lines[error:error + 8])
    assert LONG in shown
    assert re.search(r"created +20..-..-.. ..:..:.. UTC \(\d+ m?s ago\)", "\n".join(lines))


def test_control_characters_are_shown_as_text(ctl, conn, failed):
    conn.execute("UPDATE job_instances SET description = E'a\\x1b[2Jb\\u009bc\\u202ed\\ne'")
    for args in (["list"], ["show", failed], ["log", failed]):
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", ctl(*args))
    assert r"a\x1b[2Jb\x9bc\u202ed e" in ctl("list")


def test_list_since_takes_a_length_of_time(ctl, conn, failed):
    conn.execute("UPDATE job_instances SET created = now() - interval '25 h'")
    for since, found in (("24h", []), ("26h", [failed]), ("2 days", [failed])):
        assert [job["id"] for job in json.loads(ctl("list", "--json", "--since", since))] == found


def test_list_text_finds_what_a_failed_step_says_and_takes_percent_as_it_is(ctl, failed):
    for text, found in (("OF WIND_SPEED NO", [failed]), ("33.33%", [failed]), ("3%3", [])):
        assert [job["id"] for job in json.loads(ctl("list", "--json", "--text", text))] == found


def test_list_watch_shows_again_what_has_changed(ctl, conn, failed):
    watching = subprocess.Popen(
        [sys.executable, ROOT / "jobctl.py", "list", "--watch", "--interval", "0.02"],
        stdout=subprocess.PIPE, text=True)
    try:
        assert "Failed" in [watching.stdout.readline() for _ in range(3)][2]
        control.retry_job(conn, failed)
        assert any("Queued" in line for line in watching.stdout)
    finally:
        watching.kill()
        watching.communicate()


def test_log_tells_a_life_in_the_order_of_time(ctl, conn, failed):
    conn.execute("UPDATE job_instances SET created = now() - interval '70 s', schedule_id = 7, "
                 "run_after = now() - interval '65 s', attempts = 2, "
                 "cancel_requested = now() - interval '35 s'")
    events = [line[29:] for line in ctl("log", failed).splitlines()[2:]]
    for event, start in zip(events, [
            "asked for by schedule 7", "to be tried again", "begun, attempt 2",
            "step 1 LAN-01 / alarm 111: Finished after 10.000 s",
            "asked to stop before its next step",
            f"step 2 LAN-02 / alarm 111: Failed after 10.000 s: {LONG[:50]}",
            "step 3 LAN-03 / alarm 111: Finished",
            "Failed: 1 (33.33%) steps failed"], strict=True):
        assert event.strip().startswith(start), events


@pytest.mark.parametrize(("change", "why", "stuck"), [
    ("UPDATE job_instances SET description = 'Latest'", '"test" in its description', True),
    ("UPDATE job_types SET max_running = 0", "its type is paused", True),
    ("UPDATE job_instances SET run_after = '2999-01-01'",
     "not due before 2999-01-01 00:00:00 UTC", False),
    ("UPDATE job_types SET name = 'Elsewhere' WHERE name = 'Alarm Calculation'",
     "no file here provides its type", False),
    ("SELECT", "no handler runs just now", False),
    ("INSERT INTO job_workers (id, host, pid, backend_pid) VALUES (1, 'h', 1, 1)",
     "for its turn", False),
])
def test_why_a_job_waits(ctl, conn, change, why, stuck):
    conn.execute("INSERT INTO job_instances (job_type_id) "
                 "SELECT id FROM job_types WHERE name = 'Alarm Calculation'")
    conn.execute(change)
    assert why in ctl("show", 1)
    assert why in ctl("log", 1)
    if stuck:  # nothing can move: watch ends
        assert why in ctl("watch", 1, expect=1)
        assert why in ctl("watch")


@pytest.mark.parametrize(("width", "shown"), [
    (40, ["id", "text"]), (60, ["id", "what", "text"]), (None, ["id", "when", "what", "text"])])
def test_what_matters_less_gives_way(width, shown):
    heads = ["id", "when", "what", "text"]
    row = (1, "w" * 20, "x" * 20, "y" * 50)
    lines = tables.table(heads, [row], width, ["when", "what"]).splitlines()
    assert lines[0].split() == shown
    assert max(map(len, lines)) <= (width or 999)


def test_one_long_text_does_not_widen_every_line_of_a_pipe(failed, conn):
    conn.execute("INSERT INTO job_instances (job_type_id, description, comment) "
                 "SELECT id, repeat('x', 30000 * (n / 9)), 'why' "
                 "FROM job_types, generate_series(1, 9) n WHERE name = 'Alarm Calculation'")
    assert len(piped("list")) < 100_000


@pytest.mark.parametrize("args", [["list"], ["show", "1"], ["list", "--json"]])
def test_a_terminal_that_lacks_a_character_shows_the_rest(failed, conn, args):
    conn.execute("UPDATE job_instances SET description = repeat('Größe 日本 ', 40)")
    env = os.environ | {"PYTHONIOENCODING": "latin-1", "COLUMNS": "80"}
    done = subprocess.run([sys.executable, ROOT / "jobctl.py", *args], capture_output=True,
                          env=env)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "Größe" in done.stdout.decode("latin-1") or "--json" in args
    if "--json" in args:
        assert json.loads(done.stdout)[0]["description"].startswith("Größe 日本 ")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("command", ["jobctl.py list", "jobctl.py watch 1", "report.py jobs"])
def test_a_closed_stream_is_no_error(failed, closed, command):
    done = subprocess.run(["bash", "-c", f"exec {sys.executable} {ROOT}/{command} {closed}"],
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (int("watch" in command), "")
    assert bool(done.stdout) == (">&-" not in closed.replace("2>&-", ""))
