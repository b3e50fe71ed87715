"""The page `jobs`: what needs somebody, what the schedules did, what runs, how fast it is.

Each part is a function of the connection that runs one query and returns HTML. Every query is
bounded, by an index or by RECENT: the page costs the same behind a million jobs.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import psycopg

import doctor
from perfdb import rows_of
from report_page import (
    Html,
    cell,
    cells,
    command,
    escape,
    grid,
    legend,
    line,
    rect,
    section,
    short_name,
    shorten,
    svg,
    table,
)
from tables import age, duration, elapsed

RECENT = 20_000  # jobs at most that figures of the last day are made of, the newest ids
MOST = {"running": 50, "schedules": 30, "windows": 31, "steps": 40, "types": 60}

FINDINGS = 30  # of doctor at most
LONGEST_REMEDY = 600

STATE_CLASSES = {"Finished": "o", "Failed": "F", "Running": "R", "Created": "W", "Queued": "W"}


COMMAND = re.compile(r".*?((?:python|SELECT|VACUUM|ANALYZE|ALTER|UPDATE|GRANT|CREATE|DELETE) .*)",
                     re.DOTALL)


def attention(connection: psycopg.Connection, findings: list[str]) -> str:
    """Show which jobs failed, by their comments, and what doctor found, each with its command."""
    failures = doctor.fetch_failures(connection)
    parts = [card("failed", shorten(doctor.failure_facts(failure), 400),
                  shorten(failure["comment"], 400), doctor.retry_command(failure))
             for failure in failures]
    if len(failures) == doctor.MOST_FAILURES:
        parts.append(card("more may have failed", "", "",
                          "python jobctl.py list --state Failed --since 24h"))
    parts += [finding_card(finding) for finding in findings[:FINDINGS]]
    if more := len(findings) - FINDINGS:
        parts += [card(f"{more} more findings", "", "", "python jobctl.py doctor")] * (more > 0)
    return section("Needs attention", *(parts or [
        "<p>Nothing: no job failed in the last day, and doctor found nothing.</p>"]))


def finding_card(finding: str) -> str:
    kind, _, said = finding.partition(": ")
    remedy = ""
    if found := COMMAND.fullmatch(said.rpartition(": ")[2]):
        remedy, said = found[1], said[:said.rindex(found[1])].rstrip(": ")
    said = shorten(said, 400)
    is_note = isinstance(finding, doctor.Note)
    return card("note" if is_note else kind, kind if is_note else "", said, remedy, not is_note)


def card(label: str, facts: str, said: str, remedy: str, act: bool = True) -> str:
    if len(remedy) > LONGEST_REMEDY:  # cut it would be wrong
        remedy = "python jobctl.py doctor"
    return (f'<div class="card{" act" * act}"><p><span class="big">{escape(label)}</span> '
            f'<span class="dim">{escape(facts)}</span><br>{escape(said)}</p>'
            f'{command(remedy) if remedy else ""}</div>\n')


# Windows are counted from the anchor; the mean length of a hundred of them tells which is the
# latest whatever months and days are made of. A window's job is looked up by index, one by one.
SCHEDULES_SQL = """
WITH schedule AS (
    SELECT s.*, t.name AS job_type,
           floor(extract(epoch FROM now() - s.first_start)
                 / extract(epoch FROM s.first_start + s.every * 100::float8 - s.first_start)
                 * 100.0)
               ::bigint AS latest
      FROM job_schedules s
      JOIN job_types t ON t.id = s.job_type_id
     ORDER BY s.enabled DESC, s.id
     LIMIT %(schedules)s
)
SELECT s.id, s.job_type, s.description, s.enabled, s.every::text AS every, s.next_start,
       w.start_time, w.end_time, j.id AS job_id, j.state, j.comment,
       w.start_time >= s.next_start AS is_owed,
       w.end_time + s.delay < now() - interval '2 minutes' AS is_due
  FROM schedule s
  LEFT JOIN LATERAL (
        SELECT s.first_start + n::float8 * s.every AS start_time,
               s.first_start + (n + 1)::float8 * s.every AS end_time
          FROM pg_catalog.generate_series(GREATEST(0, s.latest - %(windows)s - 2),
                                          s.latest + 1) AS n
         WHERE s.first_start + (n + 1)::float8 * s.every <= now()
         ORDER BY n DESC
         LIMIT %(windows)s) w ON true
  LEFT JOIN LATERAL (
        SELECT id, state, comment
          FROM job_instances
         WHERE schedule_id = s.id
           AND window_start = w.start_time
         ORDER BY id DESC
         LIMIT 1) j ON true
 ORDER BY s.enabled DESC, s.id, w.start_time
"""


def schedules(connection: psycopg.Connection) -> str:
    """Draw schedules by their last windows."""
    rows = rows_of(connection, SCHEDULES_SQL, MOST)
    if not rows:
        return section("Schedules", "<p>None. <code>jobctl schedule add</code> makes one: "
                                    "a job for every day, say.</p>")
    lines = []
    for schedule_id, windows in itertools.groupby(rows, key=lambda row: row["id"]):
        shown = list(windows)
        marks = [window_cell(row) for row in shown if row["start_time"]]
        empty = ["<i></i>"] * (MOST["windows"] - len(marks))
        lines.append(line(schedule_name(schedule_id, shown[0]), cells(empty + marks)))
    note = f"The last {MOST['windows']} windows of each, the newest at the right."
    if len(lines) == MOST["schedules"]:
        note += f" The first {len(lines)} schedules; jobctl schedule list shows all."
    return section("Schedules", grid("Schedules by their last windows", lines),
                   legend({"o": "Finished", "F": "Failed", "R": "Running", "W": "waiting",
                           "L": "owed, late", "M": "no job: pruned, or never asked for"}),
                   note=note)


def schedule_name(schedule_id: int, row: dict[str, Any]) -> str:
    off = "" if row["enabled"] else " (disabled)"
    return f"{schedule_id} {row['description'] or row['job_type']}{off}"


def window_cell(row: dict[str, Any]) -> str:
    """Return the cell of one window: by its job's state, or why it has none."""
    if row["job_id"]:
        shade, said = STATE_CLASSES[row["state"]], f"{row['state']}, job {row['job_id']}"
        said += f": {shorten(row['comment'], 80)}" if row["comment"] else ""
    elif not row["is_owed"]:
        shade, said = "M", "no job: pruned, or never asked for"
    elif row["is_due"] and row["enabled"]:
        shade, said = "L", "owed and late: does a handler run?"
    else:
        shade, said = "none", "not due yet" if row["enabled"] else "the schedule is disabled"
    return cell(shade, shade if shade != "none" else "·",
                f"from {row['start_time']:%Y-%m-%d %H:%M}: {said}")


RUNNING_SQL = """
WITH taken AS MATERIALIZED (
    SELECT id FROM job_instances WHERE worker_id IS NOT NULL ORDER BY id LIMIT %(running)s
)
SELECT v.*, now() - v.running_step_since AS step_time
  FROM v_job_instances v
 WHERE v.id = ANY(ARRAY(SELECT id FROM taken))
 ORDER BY v.started NULLS LAST, v.id
"""


def running(connection: psycopg.Connection) -> str:
    """Show each running job with a bar, its step and what is likely left."""
    rows = rows_of(connection, RUNNING_SQL, MOST)
    if not rows:
        return section("Running now", "<p>No job is running.</p>")
    note = f"The first {len(rows)}." if len(rows) == MOST["running"] else ""
    return section("Running now", table(
        ["#job", "what", "steps", "now at", "#since", "#likely left", "-host"],
        [running_row(row) for row in rows]), note=note)


def running_row(row: dict[str, Any]) -> list[Any]:
    gone, total = row["steps_done"] + row["steps_failed"], row["steps_total"]
    step = f"step {min(gone + 1, total)} of {total}" if total else "being split into steps"
    if row["steps_failed"]:
        step += f", {row['steps_failed']} failed"
    left = row["running_time"] / gone * (total - gone) if gone and row["running_time"] else None
    bar = svg(f"job {row['id']}: {100 * row['progress']:.0f} %",
              [rect("done", 0, 1000 * row["progress"])] if gone else [])
    what = f"{shorten(row['job_type'], 80)}: {shorten(row['description'], 120)}"
    return [row["id"], what,
            Html(f"{bar}{escape(step)}"), shorten(row["running_step"] or "", 80),
            age(row["step_time"]), age(left), shorten(row["worker_host"] or "", 80)]


# Among the newest jobs only: no index knows when a job started or how long it took.
GANTT_SQL = """
WITH recent AS MATERIALIZED (
    SELECT id, job_type_id, description, state, started, finished
      FROM job_instances
     WHERE id > (SELECT max(id) - %(recent)s FROM job_instances)
       AND started IS NOT NULL
), chosen AS (
    (SELECT 'latest' AS why, * FROM recent ORDER BY started DESC, id DESC LIMIT 1)
     UNION ALL
    (SELECT 'slowest', * FROM recent
      WHERE finished > now() - interval '1 day' ORDER BY finished - started DESC, id LIMIT 1)
)
SELECT c.why, c.id, t.name AS job_type, c.description, c.state AS job_state,
       c.started AS job_started, COALESCE(c.finished, now()) AS job_end,
       s.position, s.name, s.state, s.started, COALESCE(s.finished, now()) AS step_end,
       s.comment, s.steps
  FROM chosen c
  JOIN job_types t ON t.id = c.job_type_id
 CROSS JOIN LATERAL (
        SELECT *, count(*) OVER () AS steps
          FROM job_steps
         WHERE job_instance_id = c.id
           AND started IS NOT NULL
           AND (finished IS NOT NULL OR state = 'Running')
         ORDER BY COALESCE(finished, now()) - started DESC, position
         LIMIT %(steps)s) s
 ORDER BY c.why, s.position
"""


def gantt(connection: psycopg.Connection) -> str:
    """Draw the steps of the latest and of the slowest job over time."""
    rows = rows_of(connection, GANTT_SQL, MOST | {"recent": RECENT})
    if not rows:
        return section("Steps over time", "<p>No job has been run yet.</p>")
    jobs = [list(group) for _, group in itertools.groupby(rows, key=lambda row: row["why"])]
    if len(jobs) == 2 and jobs[0][0]["id"] == jobs[1][0]["id"]:
        jobs = jobs[:1]
        jobs[0][0]["why"] = "latest and slowest"
    return section("Steps over time", *map(gantt_of, jobs),
                   note="The latest job, and the slowest that ended within a day.")


def gantt_of(steps: list[dict[str, Any]]) -> str:
    job = steps[0]
    start = min(job["job_started"], *(step["started"] for step in steps))
    length = max(elapsed(start, job["job_end"]).total_seconds(), 1e-3)

    def bar(step: dict[str, Any]) -> str:
        left = elapsed(start, step["started"]).total_seconds() / length
        took = elapsed(step["started"], step["step_end"]).total_seconds()
        tip = f"{short_name(step['name'])}: {step['state']}, {duration(took)}"
        tip += f": {shorten(step['comment'], 200)}" if step["comment"] else ""
        shade = "failed" if step["state"] == "Failed" else "mark"
        return line(f"{step['position']} {step['name']}",
                    svg(tip, [rect(shade, min(1000 * left, 999), 1000 * took / length, tip)]))
    title = (f"The {job['why']}: job {job['id']}, {job['job_type']}, "
             f"{shorten(job['description'], 120)}, {job['job_state']}, "
             f"{duration(length)} from {start:%d %b %H:%M:%S}")
    if job["steps"] > len(steps):
        title += f"; its {len(steps)} longest steps of {job['steps']}"
    if failed := [str(step["position"]) for step in steps if step["state"] == "Failed"]:
        title += f"; failed: {', '.join(failed)}"
    return f"<h3>{escape(title)}.</h3>{grid(title, map(bar, steps))}"


# Waiting jobs by the claim's index, ended ones by their ids.
TYPES_SQL = """
WITH waiting AS (
    SELECT job_type_id, count(*) AS waiting, now() - min(GREATEST(created, run_after)) AS oldest
      FROM (SELECT job_type_id, created, run_after
              FROM job_instances
             WHERE state IN ('Created', 'Queued')
               AND worker_id IS NULL
               AND run_after <= now()
             LIMIT %(recent)s) AS w
     GROUP BY 1
), recent AS MATERIALIZED (
    SELECT job_type_id, state, finished, finished - started AS took, created
      FROM job_instances
     WHERE id > (SELECT max(id) - %(recent)s FROM job_instances)
       AND finished > now() - interval '1 day'
), ended AS (
    SELECT job_type_id, count(*) AS ended, count(*) FILTER (WHERE state = 'Failed') AS failed,
           pg_catalog.percentile_cont(0.5) WITHIN GROUP (ORDER BY took) AS median,
           pg_catalog.percentile_cont(0.95) WITHIN GROUP (ORDER BY took) AS p95
      FROM recent
     GROUP BY 1
), hour AS (
    SELECT job_type_id,
           pg_catalog.jsonb_object_agg(ago, pg_catalog.jsonb_build_array(ended, failed)) AS hours
      FROM (SELECT job_type_id, floor(extract(epoch FROM now() - finished) / 3600.0)::int AS ago,
                   count(*) AS ended, count(*) FILTER (WHERE state = 'Failed') AS failed
              FROM recent
             GROUP BY 1, 2) AS h
     GROUP BY 1
)
SELECT t.name, COALESCE(w.waiting, 0) AS waiting, w.oldest, COALESCE(e.ended, 0) AS ended,
       COALESCE(e.failed, 0) AS failed, e.median, e.p95, COALESCE(h.hours, '{}') AS hours,
       (SELECT count(*) >= %(recent)s FROM recent) AS is_cut
  FROM job_types t
  LEFT JOIN waiting w ON w.job_type_id = t.id
  LEFT JOIN ended e ON e.job_type_id = t.id
  LEFT JOIN hour h ON h.job_type_id = t.id
 ORDER BY t.name
 LIMIT %(types)s
"""


def types(connection: psycopg.Connection) -> str:
    """Show what waits, what ended in the last 24 hours, and how long it took, per type."""
    rows = rows_of(connection, TYPES_SQL, MOST | {"recent": RECENT})
    if not rows:
        return section("Job types", "<p>None: <code>python jobctl.py init</code> writes them.</p>")
    note = "The last 24 hours; a bar per hour, the latest at the right, its foot the failed ones."
    if rows[0]["is_cut"]:
        note += f" Of the latest {RECENT:,} jobs only."
    if len(rows) == MOST["types"]:
        note += f" The first {len(rows)} types; jobctl stats shows all."
    return section("Job types", table(
        ["type", "#waiting", "#oldest", "#ended", "#failed", "#median", "#-p95", "-24 hours"],
        [[shorten(row["name"], 80), row["waiting"], age(row["oldest"]), row["ended"],
          failed_share(row), row["median"], row["p95"], sparkline(row)] for row in rows]),
        note=note)


def failed_share(row: dict[str, Any]) -> str:
    share = f" ({100 * row['failed'] / row['ended']:.0f} %)" if row["failed"] else ""
    return f"{row['failed']}{share}"


def sparkline(row: dict[str, Any]) -> str:
    """Return ended jobs per hour as 24 bars."""
    most = max((ended for ended, _ in row["hours"].values()), default=1)
    bars = []
    for ago, (ended, failed) in sorted(row["hours"].items()):
        left, height = 1000 - 41.6 * (int(ago) + 1), 24 * ended / most
        tip = f"{ago} to {int(ago) + 1} h ago: {ended} ended, {failed} failed"
        bars.append(rect("mark", left, 38, tip, 24 - height, height))
        if failed:
            bars.append(rect("failed", left, 38, tip, 24 - 24 * failed / most, 24 * failed / most))
    return svg(f"{short_name(row['name'])}: {row['ended']} ended in 24 hours", bars, 24)


DATABASE_SQL = """
SELECT name, GREATEST(c.reltuples, s.n_live_tup, 0)::bigint AS rows, s.n_dead_tup AS dead,
       pg_size_pretty(pg_total_relation_size(c.oid::regclass)) AS size,
       GREATEST(s.last_autovacuum, s.last_vacuum) AS vacuumed
  FROM pg_catalog.unnest(%(tables)s::text[]) WITH ORDINALITY AS t(name, n)
  JOIN pg_class c ON c.oid = to_regclass(name)::oid
  LEFT JOIN pg_stat_all_tables s ON s.relid = c.oid
 ORDER BY t.n
"""

TABLES = ["job_instances", "job_steps", "job_workers", "job_schedules", "feature_values",
          "alarms_detected", "alarms_history"]

SESSIONS_SQL = """
SELECT pg_size_pretty(pg_database_size(current_database())) AS size,
       (SELECT count(*) FROM pg_stat_activity WHERE datid IS NOT NULL) AS sessions,
       current_setting('max_connections') AS most,
       (SELECT count(*) FROM job_workers) AS workers,
       (SELECT now() - min(xact_start)
          FROM pg_stat_activity
         WHERE datname = current_database()
           AND pid <> pg_backend_pid()) AS oldest,
       current_setting('server_version') AS version
"""


def database(connection: psycopg.Connection) -> str:
    """Show the oldest transaction, dead rows and sizes."""
    facts = rows_of(connection, SESSIONS_SQL)[0]
    oldest = f"open for {age(facts['oldest'])}" if facts["oldest"] else "none besides this page's"
    note = (f"PostgreSQL {facts['version']}, {facts['size']}; oldest transaction: {oldest}; "
            f"{facts['sessions']} of {facts['most']} sessions, {facts['workers']} workers.")
    return section("Database", table(["table", "#rows", "#dead rows", "#size", "-vacuumed"], [
        [row["name"], f"{row['rows']:,}", f"{row['dead'] or 0:,}", row["size"],
         row["vacuumed"]] for row in rows_of(connection, DATABASE_SQL, {"tables": TABLES})]),
        note=escape(note))
