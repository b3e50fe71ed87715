"""The pages: what they show, for whom they hold, and that nothing from a row is obeyed."""

import html.parser
import os
import re
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pages
import psycopg
import pytest

import control
import handler
import report

ROOT = Path(__file__).parents[1]
VOID = {"meta", "link", "br"}
JOBS_PARTS = ["Needs attention", "Schedules", "Running now", "Samples", "Steps over time",
              "Job types", "Database"]
ALARMS_PARTS = ["When it stood", "Which alarms", "Which objects, which days", "Why did it stand?"]
WINDOW = ["--from", f"{pages.START:%F %T}", "--to", f"{pages.TODAY:%F %T}"]


class Page(html.parser.HTMLParser):
    """A page as text: its parts, its elements; fails where tags do not match."""

    def __init__(self, source):
        super().__init__()
        self.source, self.open, self.tags, self.titles, self.attributes = source, [], [], [], []
        self.parts, self.heading, self.rows = {}, "", []
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.attributes.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.heading = data
        self.parts[self.heading] = self.parts.get(self.heading, "") + data
        if self.rows and {"td", "th"} & set(self.open) and "title" not in self.open:
            self.rows[-1][-1] += data


@pytest.fixture
def page(dsn, tmp_path, capsys):
    """Write a page and return it."""
    def page(*args, expect=0):
        target = tmp_path / "page.html"
        assert report.main([*args, "--out", str(target)]) == expect, capsys.readouterr()
        assert os.listdir(tmp_path) == ["page.html"]
        return Page(target.read_text())
    return page


@pytest.fixture
def full(conn):
    pages.fill(conn)
    return conn


def test_the_parts_come_by_priority(full, page):
    assert re.findall("<h2>(.*?)</h2>", page("jobs").source) == JOBS_PARTS
    assert re.findall("<h2>(.*?)</h2>", page("alarms", *WINDOW).source) == ALARMS_PARTS


def test_an_empty_database_is_said_in_words(conn, page):
    handler.load_modules()
    control.write_types(conn)
    parts = page("jobs").parts
    for part, said in {"Needs attention": "Nothing: no job failed", "Schedules": "None.",
                       "Running now": "No job is running.", "Samples": "no samples yet",
                       "Steps over time": "No job has been run yet."}.items():
        assert said in parts[part]
    shown = page("alarms", *WINDOW).parts["When it stood"]
    assert shown.strip().endswith("No alarm stood in this window.")


def test_nothing_from_a_row_is_markup(full, page):
    for found, scripts in ((page("jobs"), 1), (page("alarms", *WINDOW), 0)):
        assert found.tags.count("script") == scripts
        assert pages.EVIL in found.source.replace("&lt;", "<").replace("&gt;", ">")
        assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f]", found.source)
    assert r"no wind\x1b[2J at" in page("jobs").parts["Needs attention"]


def test_nothing_is_fetched_and_only_our_script_may_run(full, page):
    for found in (page("jobs"), page("alarms", *WINDOW)):
        assert not [a for tag, a in found.attributes
                    if tag != "link" and {"src", "href", "srcset"} & set(a)]
        assert "default-src 'none'" in found.source
        assert not re.search(r"url\(|@import|https?:", found.source)


def test_failed_jobs_come_with_the_command_that_retries_them(full, page):
    shown = page("jobs").parts["Needs attention"]
    ids = [row["id"] for row in full.execute(
        "SELECT id FROM job_instances WHERE state = 'Failed' "
        "AND finished > now() - interval '1 day' AND description LIKE 'night %' ORDER BY id")]
    assert len(ids) == 4
    assert f"python jobctl.py retry {' '.join(map(str, ids))}" in shown
    assert "4 jobs of 'Alarm Calculation' failed from 20" in shown
    assert "objects 'LAN-02'" in shown


def test_schedules_show_their_windows(full, page):
    cells = [(a["class"], a["title"]) for tag, a in page("jobs").attributes
             if tag == "b" and "class" in a]
    nightly = [c for c in cells if re.match(r"from 20..-..-.. 00:00: ", c[1])][:20]
    assert "".join(shade for shade, _ in nightly) == "oFMR" + "M" * 13 + "WLL"
    assert "Failed, job" in nightly[1][1]
    assert "owed and late" in nightly[18][1]
    assert nightly[0][1].startswith(f"from {pages.START:%Y-%m-%d} 00:00: Finished, job ")


def test_a_window_that_is_not_due_is_not_late(full, page):
    full.execute("UPDATE job_schedules SET delay = '2 days'")
    titles = [a.get("title", "") for _, a in page("jobs").attributes]
    assert not [title for title in titles if "owed and late" in title]
    assert len([title for title in titles if "not due yet" in title]) == 4


def test_running_jobs_show_step_and_what_is_left(full, page):
    row = next(row for row in page("jobs").rows if "step 4 of 10" in "".join(row))
    assert row[1].startswith("Alarm Calculation: NNN")
    assert row[5:] == ["4 min", "ops1"]  # 3 steps took 90 s


def test_coverage_counts_samples_by_day(full, page):
    day = pages.TODAY - timedelta(days=2)
    titles = [a.get("title", "") for _, a in page("jobs").attributes]
    assert f"LAN-01, {day:%Y-%m-%d}: 144 of 144 samples of wind_speed" in titles
    assert f"LAN-02, {day:%Y-%m-%d}: 114 of 144 samples of wind_speed" in titles


def test_coverage_leaves_out_what_is_no_value(full, page):
    full.execute("UPDATE feature_values SET value = CASE WHEN object_id = 1 "
                 "THEN 'NaN'::float8 END WHERE timestamp = %s", [pages.TODAY - timedelta(days=1)])
    day = pages.TODAY - timedelta(days=2)  # midnight's sample stands for the day before
    titles = [a.get("title", "") for _, a in page("jobs").attributes]
    assert f"LAN-01, {day:%Y-%m-%d}: 143 of 144 samples of wind_speed" in titles


def test_figures_per_type_are_the_tables(full, page):
    facts = full.execute("""
        SELECT count(*) AS ended, count(*) FILTER (WHERE state = 'Failed') AS failed,
               percentile_cont(0.5) WITHIN GROUP (ORDER BY finished - started) AS median
          FROM job_instances WHERE finished > now() - interval '1 day'""").fetchone()
    row = next(row for row in page("jobs").rows if row[0] == "Alarm Calculation")
    assert row[3:6] == [str(facts["ended"]), f"{facts['failed']} (17 %)",
                        report.report_jobs.duration(facts["median"].total_seconds())]
    assert row[1] == str(full.execute("SELECT count(*) FROM job_instances WHERE state = 'Created'")
                         .fetchone()["count"])


def test_hours_of_alarms_are_the_tables(full, page):
    found = page("alarms", *WINDOW)
    hours = {row["number"]: (row["hours"], row["periods"]) for row in full.execute("""
        SELECT a.manufacturer_id AS number, count(*) AS periods,
               round(sum(extract(epoch FROM h.end_time - h.start_time)) / 3600, 1)::text AS hours
          FROM alarms_history h JOIN alarms a ON a.id = h.alarm_id GROUP BY 1""")}
    rows = {int(row[0]): (row[2], int(row[5])) for row in found.rows[1:]}
    assert rows == hours
    assert list(rows) == [112, 111]  # the largest first


def test_a_period_over_the_edge_counts_for_the_part_inside(full, page):
    cut = pages.TODAY - timedelta(days=1) + timedelta(hours=3)
    for start, end, hours in ((cut, pages.TODAY, "0.7"), (cut - timedelta(hours=3), cut, "1.0")):
        rows = page("alarms", "--from", f"{start:%F %T}", "--to", f"{end:%F %T}",
                    "--object", "LAN-01").rows
        assert [(row[0], row[2], row[5]) for row in rows[1:]] == [
            (number, hours, "1") for number in sorted(["111", "112"], reverse=hours == "0.7")]


def test_a_night_with_a_clock_change_is_as_long_as_it_was(full, page, monkeypatch):
    monkeypatch.setenv("PERFDB_TIMEZONE", "Europe/Madrid")
    full.execute("DELETE FROM alarms_history")
    full.execute("INSERT INTO alarms_history (object_id, alarm_id, start_time, end_time) "
                 "VALUES (1, 1, '2026-10-25 00:00+02', '2026-10-25 06:00+01')")
    found = page("alarms", "--from", "2026-10-25 00:00:00", "--to", "2026-10-26 00:00:00")
    assert "LAN-01 111 25 Oct 00:00 to 25 Oct 06:00 (7:00:00)" in found.source
    bar = next(a for tag, a in found.attributes if a.get("class") == "mark")
    assert (bar["x"], bar["width"]) == ("0.0", "280.0")  # 7 of 25 hours


def test_touching_bars_are_drawn_as_one_and_counted(full, page):
    full.execute("DELETE FROM alarms_history")
    full.execute("INSERT INTO alarms_history (object_id, alarm_id, start_time, end_time) "
                 "SELECT 1, 1, at, at + interval '1 min' FROM generate_series(0, 9999) n, "
                 "LATERAL (SELECT %(start)s + n * interval '2 min') a(at)", {"start": pages.START})
    found = page("alarms", *WINDOW)
    assert [a.get("class") for tag, a in found.attributes if tag == "rect"].count("mark") < 10
    assert "10,000 periods" in found.parts["When it stood"]


def test_an_object_that_is_not_there_is_refused(full, dsn, capsys):
    assert report.main(["alarms", *WINDOW, "--object", "LAN-99"]) == 1
    assert "there is no object 'LAN-99'" in capsys.readouterr().err


@pytest.mark.parametrize("args", [
    [], ["alarms"], ["alarms", "--from", "soon", "--to", "2026-01-01 00:00:00"],
    ["alarms", "--from", "2026-01-02 00:00:00", "--to", "2026-01-02 00:00:00"],
    ["jobs", "--every", "0"], ["jobs", "x"]])
def test_wrong_usage_is_status_2(args):
    with pytest.raises(SystemExit) as exc:
        report.main(args)
    assert exc.value.code == 2


def test_no_database_and_no_tables_are_status_3(server, tmp_path, capsys):
    assert report.main(["jobs", "--dsn", f"host={tmp_path}"]) == 3
    assert report.main(["jobs", "--dsn", server.dsn()]) == 3
    assert "jobctl.py init" in capsys.readouterr().err


def test_a_part_that_cannot_be_shown_says_so_and_the_others_are_there(full, page, monkeypatch):
    monkeypatch.setattr(report.report_jobs, "RUNNING_SQL", "SELECT 1 / 0")
    found = page("jobs", expect=1)
    assert "This part cannot be shown: division by zero" in found.parts["Running now"]
    assert "LAN-01" in found.parts["Samples"]


def test_an_old_page_stays_when_the_new_one_cannot_be_made(full, dsn, tmp_path, monkeypatch):
    target = tmp_path / "page.html"
    target.write_text("old")
    monkeypatch.setattr(report, "page", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        report.main(["jobs", "--out", str(target)])
    assert target.read_text() == "old"


CROWD_SQL = """
INSERT INTO objects (object_model_id, name) SELECT 1, %(long)s || n FROM generate_series(1, 300) n;
INSERT INTO alarms (object_model_id, manufacturer_id, name, trigger)
SELECT 1, n, %(long)s, '{}' FROM generate_series(200, 240) n;
INSERT INTO alarms_history (object_id, alarm_id, start_time, end_time)
SELECT o.id, a.id, %(start)s + n * interval '9 h', %(start)s + n * interval '9 h' + interval '2 h'
  FROM objects o, alarms a, generate_series(0, 40) n
 WHERE o.id BETWEEN 10 AND 60;
INSERT INTO feature_values SELECT o.id, 1, %(start)s + n * interval '1 h', 1
  FROM objects o, generate_series(1, 480) n WHERE o.id > 100;
INSERT INTO job_schedules (job_type_id, description, every, first_start, next_start)
SELECT 1, %(long)s, interval '1 hour', now() - interval '100 days', now()
  FROM generate_series(1, 100);
INSERT INTO job_instances (job_type_id, state, description, comment, started, finished)
SELECT 1, 'Failed', %(long)s, repeat(n || ' ', 3000), now(), now() FROM generate_series(1, 3000) n;
INSERT INTO job_instances (job_type_id, state, description, worker_id, started)
SELECT 1, 'Running', repeat(%(long)s, 20), 77, now() FROM generate_series(1, 300) n;
INSERT INTO job_steps (job_instance_id, position, name, state, comment, started, finished)
SELECT max(id), n, repeat(%(long)s, 10), 'Failed', repeat(%(long)s, 50), now(), now()
  FROM job_instances, generate_series(1, 1000) n GROUP BY n;
INSERT INTO job_types (name) SELECT n || %(long)s FROM generate_series(1, 100) n;
ANALYZE
"""


@pytest.mark.parametrize("long", [pages.LONG, '"' * 300, "😀" * 300], ids=["N", "quote", "emoji"])
def test_pages_stay_small_and_quick_whatever_is_in_the_database(full, page, long):
    with psycopg.ClientCursor(full) as cursor:
        cursor.execute(CROWD_SQL, {"long": long, "start": pages.START})
    for args in (["jobs"], ["alarms", *WINDOW]):
        began = time.monotonic()
        source = page(*args).source
        sizes = {part[:12]: len(part.encode()) for part in source.split("<h2>")}
        assert len(source.encode()) < 280_000, sizes
        assert source.count("<rect") < 1500
        assert ("The first 200 of 303 objects" in source) == (args[0] == "alarms")
        assert ("The first 30 schedules" in source) == (args[0] == "jobs")
        assert ("The first 60 types" in source) == (args[0] == "jobs")
        assert time.monotonic() - began < 5  # a page that is not bounded takes minutes


def test_the_page_is_utf_8_wherever_it_is_written_to(full):
    done = subprocess.run([sys.executable, ROOT / "report.py", "jobs"], capture_output=True,
                          env=os.environ | {"PYTHONIOENCODING": "latin-1"}, check=True)
    assert "N…" in done.stdout.decode()


@pytest.mark.parametrize(("rule", "value"), [
    ('"threshold_value": 1e400', 1), (f'"x": {"9" * 5000}', 1),
    ('"threshold_type": ["high"], "threshold_value": 20', 1), ('"threshold_value": 20', 1e308)])
def test_an_odd_trigger_or_sample_is_drawn_as_far_as_it_goes(full, page, rule, value):
    full.execute("UPDATE alarms SET trigger = %s::jsonb",
                 [f'{{"feature_name": "wind_speed", {rule}}}'])
    full.execute("UPDATE feature_values SET value = %s * CASE WHEN extract(hour FROM timestamp) "
                 "> 11 THEN 1 ELSE -1 END", [value])
    found = page("alarms", "--from", f"{pages.TODAY - timedelta(days=4):%F %T}",
                 "--to", f"{pages.TODAY:%F %T}")
    assert "cannot be shown" not in found.source
    assert not re.search(r"\b(nan|inf)", re.sub("<style>.*</style>", "", found.source, flags=re.S))


def test_a_part_that_goes_wrong_says_so_and_the_others_are_there_too(full, page, monkeypatch):
    monkeypatch.setattr(report.report_jobs, "running", lambda _: 1 / 0)
    parts = page("jobs", expect=1).parts
    assert "cannot be shown: ZeroDivisionError" in parts["Running now"]
    assert "Finished" in parts["Schedules"]


def test_a_window_over_years_says_which_year(full, page):
    full.execute("INSERT INTO alarms_history (object_id, alarm_id, start_time, end_time) "
                 "SELECT o.id, min(a.id), '2016-03-01', '2019-06-01' FROM objects o, alarms a "
                 "WHERE o.name = 'LAN-01' GROUP BY o.id")
    shown = page("alarms", "--from", "2015-01-01 00:00:00", "--to", "2025-01-01 00:00:00").source
    assert "01 Mar 2016 00:00 to 01 Jun 2019 00:00 (28488:00:00)" in shown
    assert '<span>01<span class="wide"> Jan 2015</span>' in shown
