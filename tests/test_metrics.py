"""jobctl stats --prometheus: the figures, the text format, and the alerts that use them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import control
import jobctl
import metrics

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*="(?:[^"\\\n]|\\["\\n])*"'
SAMPLE = re.compile(rf"({NAME})(?:\{{({LABEL}(?:,{LABEL})*)\}})? (-?[0-9.e+-]+|NaN|[+-]Inf)")


def parse(text):
    """Return {(name, labels): value}, or fail where the text format does not allow it."""
    assert text.endswith("\n")
    values, types, last = {}, {}, None
    for line in text.splitlines():
        if head := re.fullmatch(rf"# (HELP|TYPE) ({NAME}) (.+)", line):
            if head[1] == "TYPE":
                assert head[2] not in types, "a metric's lines stand together"
                assert head[3] in ("gauge", "counter", "summary", "histogram", "untyped")
                types[head[2]] = last = head[3] and head[2]
            continue
        sample = SAMPLE.fullmatch(line)
        assert sample, line
        assert sample[1] in ([last] if types[last] == "gauge" else
                             [last, f"{last}_sum", f"{last}_count"])
        assert (sample[1], sample[2]) not in values, "twice"
        values[sample[1], sample[2] or ""] = float(sample[3])
    return values, types


@pytest.fixture
def written(conn, dsn, tmp_path, capsys):
    """Write the file and return its values and types."""
    def written(target="perf.prom"):
        assert jobctl.main(["stats", "--prometheus", str(tmp_path / target)]) == 0
        assert capsys.readouterr().out == ""
        return parse((tmp_path / target).read_text())
    control.write_types(conn)
    return written


def test_the_figures_are_the_tables(conn, written):
    conn.execute(r"""
        INSERT INTO job_types (name) VALUES (E'a "quoted" \\ name\n');
        INSERT INTO job_instances (job_type_id, state, created, run_after, started, finished,
                                   worker_id)
        SELECT t.id, s.state, now() - interval '90 s', now() - interval '90 s', s.started,
               s.finished, s.worker
          FROM job_types t, (VALUES
            ('Created', NULL::timestamptz, NULL::timestamptz, NULL::bigint),
            ('Running', now(), NULL, 5), ('Finished', now() - interval '5 s', now(), NULL),
            ('Failed', now() - interval '5 s', now(), NULL),
            ('Failed', now() - interval '5 d', now() - interval '4 d', NULL)
          ) AS s(state, started, finished, worker)
         WHERE t.name LIKE 'a %';
        INSERT INTO job_steps (job_instance_id, position, state, started, finished)
        SELECT id, n, 'Finished', now() - n * interval '1 s', now()
          FROM job_instances, generate_series(1, 3) n WHERE state = 'Finished';
        INSERT INTO job_steps (job_instance_id, position)
        SELECT id, 4 FROM job_instances WHERE state = 'Failed';
        INSERT INTO job_workers (id, host, pid, backend_pid) VALUES (5, 'h', 1, 1), (6, 'h', 2, 2);
        INSERT INTO job_schedules (job_type_id, every, first_start, next_start)
        SELECT id, interval '1 hour', start, start
          FROM job_types, (VALUES (now() - interval '75 min'), (now() - interval '65 min'),
                                  (now())) AS w(start)
         WHERE name LIKE 'a %'""")
    values, types = written()
    of_type = r'type="a \"quoted\" \\ name\n"'
    oldest = values.pop(("perfdb_jobs_oldest_waiting_seconds", of_type))
    assert 90 <= oldest < 120
    assert {name: value for (name, labels), value in values.items() if labels == of_type} == {
        "perfdb_jobs_waiting": 1, "perfdb_jobs_running": 1, "perfdb_jobs_ended_last_day": 2,
        "perfdb_jobs_failed_last_day": 1, "perfdb_step_duration_seconds_sum": 6,
        "perfdb_step_duration_seconds_count": 3}
    assert (values["perfdb_workers", ""], values["perfdb_schedules_behind", ""]) == (2, 1)
    assert set(types) == set(metrics.METRICS)


def test_names_follow_the_conventions(written):
    _, types = written()
    for name, kind in types.items():
        assert re.fullmatch(r"perfdb_[a-z_]+", name)
        assert name.endswith("_total") == (kind == "counter")
        assert ("seconds" in name.split("_")) == name.endswith("_seconds")


def test_the_file_is_replaced_whole(written, tmp_path, capsys):
    (tmp_path / "perf.prom").write_text("old")
    written()
    assert os.listdir(tmp_path) == ["perf.prom"]
    assert (tmp_path / "perf.prom").stat().st_mode & 0o777 == 0o644
    assert jobctl.main(["stats", "--prometheus", "/no/such/directory/x"]) == 1
    assert "/no/such/directory" in capsys.readouterr().err


def test_the_alert_rules_use_metrics_that_are_written(written):
    rules = (EXAMPLES / "prometheus_alerts.yml").read_text()
    values, _ = written()
    names = set(re.findall(r"\bperfdb_\w+", rules))
    assert len(re.findall(r"^ +- alert: \w+$", rules, re.MULTILINE)) == 4
    assert names <= {name for name, _ in values} | {"perfdb_jobs"}
    assert len(names) >= 4


def test_a_device_is_written_to_and_a_link_stays_one(written, tmp_path):
    (tmp_path / "real.prom").touch()
    (tmp_path / "link.prom").symlink_to("real.prom")
    written("link.prom")
    assert (tmp_path / "link.prom").is_symlink()
    assert (tmp_path / "real.prom").read_text().startswith("# HELP")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    assert jobctl.main(["stats", "--prometheus", str(tmp_path / "pipe")]) == 0
    assert os.read(reader, 100).startswith(b"# HELP")
    assert (tmp_path / "pipe").is_fifo()
    os.close(reader)


@pytest.mark.parametrize(("target", "said"), [
    ("", "is empty"), ("/no/such/file", "No such file or directory: '/no/such/file'"),
    ("/", "directory: '/'")])
def test_a_file_that_cannot_be_written_is_named_as_it_was_given(conn, dsn, capsys, target, said):
    assert jobctl.main(["stats", "--prometheus", target]) == 1
    assert said in capsys.readouterr().err


def test_standard_output_may_be_the_file(conn, dsn):
    done = subprocess.run([sys.executable, ROOT / "jobctl.py", "stats", "--prometheus",
                           "/dev/stdout"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("# HELP")
