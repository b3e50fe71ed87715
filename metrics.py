"""The figures of `jobctl stats`, and the same for Prometheus (node_exporter's textfile collector).

They are gauges: rows are pruned and jobs run again, so nothing here only ever grows.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import psycopg

from perfdb import rows_of
from tables import replace_file

# Waiting and running jobs come from the two partial indexes, ended ones from the BRIN index on
# finished.
STATS_SQL = """
SELECT t.name AS job_type, w.waiting, w.oldest_waiting, r.running, e.ended, e.failed,
       e.ended::float8 / GREATEST(extract(epoch FROM %(since)s::interval) / 3600.0, 1e-6)::float8
           AS per_hour,
       e.failed::float8 / NULLIF(e.ended, 0)::float8 AS failure_rate, e.mean_running_time
  FROM job_types t
 CROSS JOIN LATERAL (
        SELECT count(*) AS waiting, now() - min(GREATEST(created, run_after)) AS oldest_waiting
          FROM job_instances
         WHERE state IN ('Created', 'Queued')
           AND worker_id IS NULL
           AND job_type_id = t.id
           AND run_after <= now()) w
 CROSS JOIN LATERAL (
        SELECT count(*) AS running
          FROM job_instances
         WHERE worker_id IS NOT NULL
           AND job_type_id = t.id) r
 CROSS JOIN LATERAL (
        SELECT count(*) AS ended, count(*) FILTER (WHERE state = 'Failed') AS failed,
               avg(finished - started) AS mean_running_time
          FROM job_instances
         WHERE finished > now() - %(since)s::interval
           AND job_type_id = t.id) e
 ORDER BY t.name
"""

STEPS_SQL = """
SELECT t.name AS job_type, pg_catalog.count(s.id) AS steps,
       COALESCE(extract(epoch FROM sum(s.finished - s.started)), 0)::float8 AS seconds
  FROM job_types t
  LEFT JOIN job_instances j ON j.job_type_id = t.id AND j.finished > now() - %(since)s::interval
  LEFT JOIN job_steps s ON s.job_instance_id = j.id AND s.finished IS NOT NULL
 GROUP BY t.name
 ORDER BY t.name
"""

SYSTEM_SQL = """
SELECT (SELECT count(*) FROM job_workers) AS workers,
       (SELECT count(*)
          FROM job_schedules
         WHERE enabled
           AND next_start + every + delay < now() - interval '10 minutes') AS behind,
       extract(epoch FROM now())::float8 AS now
"""

WINDOW = "24 hours"

#: name -> type, what it says. Names end in their unit; `type` is the job type.
METRICS = {
    "perfdb_jobs_waiting": ("gauge", "Due jobs that nobody has in hand."),
    "perfdb_jobs_oldest_waiting_seconds": ("gauge", "How long the oldest of them has been due."),
    "perfdb_jobs_running": ("gauge", "Jobs that a worker has in hand."),
    "perfdb_jobs_ended_last_day": ("gauge", "Jobs that ended in the last 24 hours."),
    "perfdb_jobs_failed_last_day": ("gauge", "Those of them that failed or were cancelled."),
    "perfdb_step_duration_seconds": (
        "summary", "Steps of the jobs ended in the last 24 hours: sum / count is their mean."),
    "perfdb_workers": ("gauge", "Workers that are registered."),
    "perfdb_schedules_behind": ("gauge", "Schedules that owe a job for over 10 minutes."),
    "perfdb_written_timestamp_seconds": ("gauge", "When this was written, by the server's clock."),
}

Sample = tuple[str, dict[str, str], float]  # name, labels, value


def write(connection: psycopg.Connection, path: str) -> None:
    """Write all figures to the file `path` in Prometheus's text format, beside it and renamed."""
    replace_file(path, "".join(f"{line}\n" for line in exposition(samples(connection))))


def samples(connection: psycopg.Connection) -> Iterator[Sample]:
    for row in rows_of(connection, STATS_SQL, {"since": WINDOW}):
        labels = {"type": row["job_type"]}
        oldest = row["oldest_waiting"].total_seconds() if row["oldest_waiting"] else 0
        yield "perfdb_jobs_waiting", labels, row["waiting"]
        yield "perfdb_jobs_oldest_waiting_seconds", labels, oldest
        yield "perfdb_jobs_running", labels, row["running"]
        yield "perfdb_jobs_ended_last_day", labels, row["ended"]
        yield "perfdb_jobs_failed_last_day", labels, row["failed"]
    for row in rows_of(connection, STEPS_SQL, {"since": WINDOW}):
        yield "perfdb_step_duration_seconds_sum", {"type": row["job_type"]}, row["seconds"]
        yield "perfdb_step_duration_seconds_count", {"type": row["job_type"]}, row["steps"]
    system = rows_of(connection, SYSTEM_SQL)[0]
    yield "perfdb_workers", {}, system["workers"]
    yield "perfdb_schedules_behind", {}, system["behind"]
    yield "perfdb_written_timestamp_seconds", {}, system["now"]


def exposition(samples: Iterable[Sample]) -> Iterator[str]:
    """Yield the lines of the text format: the samples of one metric together, behind its head."""
    found = list(samples)
    for name, (kind, help_) in METRICS.items():
        yield f"# HELP {name} {help_}"
        yield f"# TYPE {name} {kind}"
        names = (f"{name}_sum", f"{name}_count") if kind == "summary" else (name,)
        yield from (f"{n}{written(labels)} {value!r}" for n, labels, value in found if n in names)


def written(labels: dict[str, Any]) -> str:
    """Return labels as {type="Alarm Calculation"}, their values escaped."""
    pairs = [f'{name}="{escaped(value)}"' for name, value in labels.items()]
    return f"{{{','.join(pairs)}}}" if pairs else ""


def escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
