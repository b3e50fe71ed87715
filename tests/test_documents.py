"""What the documents tell people to type, typed: every command runs, and prints what it should."""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from park import add_samples, every_ten_minutes, make_park, trigger

import alarm_calc  # noqa: F401  the shipped types
import baze_insert_alloc  # noqa: F401
import baze_tag_delete  # noqa: F401
import control
import jobctl
import report

ROOT = Path(__file__).parents[1]
COMMANDS = r"(?:\.venv/bin/)?python3? ((?:jobctl|report|handler)\.py\b.*)"

# How a command begins -> exit status, and what it prints (all of it, as a regular expression).
EXPECTED = {
    "jobctl.py init": (0, ""),
    'jobctl.py create "Alarm Calculation"': (0, r"\d+\n"),
    'jobctl.py create "Bazefield Tag Delete"': (0, r"\d+\n"),
    'jobctl.py create "Bazefield Insert Allocation"': (0, r"\d+\n"),
    "jobctl.py list": (0, r"  id  state .*\n  --.*\n(  42  Failed .*\n)?.*"),
    "jobctl.py show": (0, r"\n  Job (1|42)  Alarm Calculation .*\n  step 1 +LAN-01: no wind\n.*"),
    "jobctl.py watch": (1, r"  job 42  \[#{24}\] 1/1 Failed, 1 failed .*"),
    "jobctl.py log": (0, r".*asked for\n.*"),
    "jobctl.py cancel": (1, r"jobctl: job 42 cannot be cancelled: it is Failed; .*"),
    "jobctl.py retry": (0, r"job 1 would be retried: Failed, .*\n2 jobs would be retried; .*\n"),
    "jobctl.py doctor": (1, r"(types: .*\n)?failed: 2 jobs of .* failed .* retry 1 42\n"),
    "jobctl.py prune --older-than 90d --dry-run": (0, "0 jobs would be deleted\n"),
    "jobctl.py prune": (0, "0 jobs deleted\n"),
    "jobctl.py backfill": (0, r"  from +to +new job .*\n  --.*(yes .*){2}"),
    "jobctl.py schedule add": (0, r"\d+\n"),
    "jobctl.py schedule list": (0, r"  id  type .*"),
    "report.py": (0, r"(<!DOCTYPE html>.*</html>\n)?"),
    "handler.py --once -v": (0, r".* INFO .*|"),
    "handler.py --once": (0, ""),
    "handler.py": (0, r"(\S+ \S+ INFO .*\n)*"),
}


def typed(path):
    """Return the commands a document tells people to type, each as it would be pasted."""
    found, lines = [], iter((ROOT / path).read_text().splitlines())
    for line in lines:
        for command in re.findall(f"`{COMMANDS}`".replace(".*", "[^`]*"), line) or re.findall(
                rf"^(?:    |\$ |.*for ever, from systemd: |ExecStart=\S*/){COMMANDS}".replace(
                    r"(?:\.venv/bin/)?", r"(?:\S*/)?"), line):
            while command.count("'") % 2 or command.endswith("\\"):  # goes on in the next line
                command = command.removesuffix("\\") + next(lines)
            found.append(re.sub(r" +#.*", "", command).strip())
    return found


DOCUMENTS = ["README.md", "OPERATIONS.md", "jobctl.py", "report.py", "handler.py",
             "examples/perfserver.service"]
TYPED = sorted({command for path in DOCUMENTS for command in typed(path) if "..." not in command})


SHIPPED = ["Alarm Calculation", "Bazefield Insert Allocation", "Bazefield Tag Delete"]


@pytest.fixture
def site(conn, dsn, capsys):
    """A database as the documents speak of it: a park, schedule 1, and failed jobs 1 and 42."""
    control.write_types(conn, SHIPPED)
    make_park(conn, alarms={111: (trigger(), []), 112: (trigger(value=5.0), [111])})
    add_samples(conn, every_ten_minutes([9, 11, 11]))
    conn.execute("""
        INSERT INTO job_instances (id, job_type_id, state, description, comment, started, finished)
        SELECT n, id, 'Failed', 'Alarms of March', '1 (100.00%) steps failed', now(), now()
          FROM job_types, unnest('{1,42}'::int[]) n WHERE name = 'Alarm Calculation'""")
    conn.execute("""
        INSERT INTO job_steps (job_instance_id, position, name, state, comment, started, finished)
        SELECT id, 1, 'LAN-01', 'Failed', 'no wind', now(), now() FROM job_instances""")
    conn.execute("SELECT setval('job_instances_id_seq', 42)")
    conn.execute("""
        INSERT INTO job_schedules (
               job_type_id, every, first_start, next_start, enabled, parameters)
        SELECT id, '1 day', '2025-12-30Z', '2026-01-01Z', false,
               '{"object_names": ["LAN-01"], "alarm_ids": [111]}'
          FROM job_types WHERE name = 'Alarm Calculation'""")
    return conn


def run(command, directory):
    """Type a command in a directory like /opt/perfserver; end a service after a second."""
    for file in [*ROOT.glob("*.py"), ROOT / "schema.sql"]:
        if not (directory / file.name).exists():
            (directory / file.name).symlink_to(file)
    (directory / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (directory / "python").chmod(0o755)
    env = os.environ | {"PATH": f"{directory}:{os.environ['PATH']}", "NO_COLOR": "1",
                        "PYTHONPATH": str(ROOT / "examples")}
    env.pop("COLUMNS", None)
    process = subprocess.Popen(["bash", "-c", command], cwd=directory, env=env, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        out, _ = process.communicate(timeout=1 if "--workers" in command else 30)
    except subprocess.TimeoutExpired:
        process.terminate()
        out, _ = process.communicate(timeout=30)
        return (0 if process.returncode in (0, -signal.SIGTERM) else process.returncode), out
    return process.returncode, out


def test_the_documents_do_have_commands():
    assert len(TYPED) > 15


def test_every_command_prints_what_it_should(site, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for command in TYPED:
        begin = max(filter(command.startswith, EXPECTED), key=len, default=None)
        assert begin, f"{command!r} is in the documents: say in EXPECTED what it prints"
        status, out = run_here(command, capsys)
        assert (status, "Traceback" in out) == (EXPECTED[begin][0], False), (command, out)
        assert re.fullmatch(EXPECTED[begin][1], out, re.DOTALL), (command, out)


def run_here(command, capsys):
    """Run a command in this process, which is quicker; a handler in one of its own."""
    program, *words = shlex.split(re.split(" [>|]", command)[0])
    if program == "handler.py":
        return run(f"exec python {command}", Path.cwd())
    status = {"jobctl.py": jobctl, "report.py": report}[program].main(words)
    return status, "".join(capsys.readouterr())


def crontab():
    text = (ROOT / "examples" / "crontab").read_text()
    return re.findall(r"^[*\d/]+(?: +\S+){4} +cd /opt/perfserver && (.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("line", crontab(), ids=lambda line: line.split(".py ")[1][:30])
def test_every_line_of_the_crontab_is_silent_when_all_is_well(site, tmp_path, line):
    site.execute("UPDATE job_instances SET finished = now() - interval '25 h', started = now()")
    out = tmp_path / "out"
    out.mkdir()
    command = re.sub(r"/var/\S*/", f"{out}/", line.replace(r"\%", "%"))
    command = re.sub(r' --dsn "[^"]*"', "", command.replace(".venv/bin/python", "python"))
    assert run(command, tmp_path) == (0, "")
    assert ("/var/" in line) == bool(list(out.iterdir()))


def normalised(text):
    return [re.sub(r"[\d,.:-]+|\b(ms|s|min)\b", "", re.sub(r"\s+", " ", line)).strip()
            for line in text.splitlines()]


def test_readme_shows_what_the_demo_prints(dsn):
    shown = re.search(r"\n```\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    done = subprocess.run([sys.executable, ROOT / "examples" / "demo.py", "--into-my-database"],
                          capture_output=True, text=True, check=True, env=dict(os.environ))
    printed = set(normalised(done.stdout))
    missing = [line for line in normalised("\n".join(
        line for line in shown.splitlines() if "..." not in line)) if line not in printed]
    assert missing == []
