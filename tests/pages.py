"""A park and jobs for the pages, with everything on them that a page can show, and evil names."""

from datetime import UTC, datetime, timedelta

from park import add_samples, every_ten_minutes, make_park, trigger

import alarm_calc  # noqa: F401  its type
import control

EVIL = "<script>alert(1)</script>"
LONG = "N" * 200

TODAY = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
YESTERDAY, START = TODAY - timedelta(days=1), TODAY - timedelta(days=20)

JOBS_SQL = """
INSERT INTO job_instances (job_type_id, state, description, comment, created, run_after, started,
                           finished, attempts)
SELECT t.id, CASE WHEN n %% 5 = 0 THEN 'Failed' ELSE 'Finished' END,
       CASE n WHEN 1 THEN %(evil)s ELSE 'night ' || n END,
       CASE WHEN n %% 5 = 0 THEN '1 (50.00%%) steps failed' END,
       at, at, at, at + (n + 1) * interval '1 s', 1
  FROM job_types t, generate_series(1, 30) AS n,
       LATERAL (SELECT now() - n * interval '1 h') AS a(at)
 WHERE t.name = 'Alarm Calculation'
"""

STEPS_SQL = """
INSERT INTO job_steps (job_instance_id, position, name, state, object_id, comment, started,
                       finished)
SELECT j.id, k, o.name || ' / alarm 111',
       CASE WHEN k = 2 AND j.state = 'Failed' THEN 'Failed' ELSE 'Finished' END, o.id,
       CASE WHEN k = 2 AND j.state = 'Failed' THEN %(comment)s END,
       j.started, j.finished
  FROM job_instances j, (SELECT *, row_number() OVER (ORDER BY id) AS k FROM objects) o
 WHERE k <= 2
"""

RUNNING_SQL = """
WITH worker AS (
    INSERT INTO job_workers (id, host, pid, backend_pid) VALUES (77, 'ops1', 1, 1) RETURNING id
), job AS (
    INSERT INTO job_instances (job_type_id, state, description, started, worker_id)
    SELECT t.id, 'Running', %(long)s, now() - interval '90 s', worker.id
      FROM job_types t, worker WHERE t.name = 'Alarm Calculation' RETURNING id
)
INSERT INTO job_steps (job_instance_id, position, name, state, started, finished)
SELECT id, n, %(long)s || n,
       CASE WHEN n < 4 THEN 'Finished' WHEN n = 4 THEN 'Running' ELSE 'Created' END,
       CASE WHEN n <= 4 THEN now() - (120 - 30 * n) * interval '1 s' END,
       CASE WHEN n < 4 THEN now() - (90 - 30 * n) * interval '1 s' END
  FROM job, generate_series(1, 10) AS n
"""

SCHEDULE_SQL = """
WITH schedule AS (
    INSERT INTO job_schedules (job_type_id, description, parameters, every, first_start,
                               next_start)
    SELECT id, %(description)s, '{"object_names": ["LAN-01"], "alarm_ids": [111]}', '1 day',
           %(start)s, %(start)s + interval '18 days'
      FROM job_types WHERE name = 'Alarm Calculation'
    RETURNING id, job_type_id
)
INSERT INTO job_instances (job_type_id, schedule_id, window_start, state, created, started,
                           finished)
SELECT job_type_id, schedule.id, %(start)s + n * interval '1 day', state,
       now() - interval '3 days',
       CASE WHEN state <> 'Created' THEN now() - interval '3 days' END,
       CASE WHEN state IN ('Finished', 'Failed') THEN now() - interval '2 days' END
  FROM schedule, (VALUES (0, 'Finished'), (1, 'Failed'), (3, 'Running'),
                         (17, 'Created')) AS w(n, state)
"""


def fill(conn):
    """Make a park with samples and alarms, and jobs in every state."""
    control.write_types(conn, ["Alarm Calculation"])
    make_park(conn, ("LAN-01", "LAN-02", f"{EVIL} {LONG}"), {
        111: (trigger(value=20.0), []), 112: (trigger(value=10.0), [111])})
    conn.execute("UPDATE alarms SET name = %s WHERE manufacturer_id = 112", [EVIL])
    wave = [15 + 10 * (n % 144 / 72 - 1) for n in range(144 * 3)]
    add_samples(conn, every_ten_minutes(wave, TODAY - timedelta(days=3)))
    add_samples(conn, every_ten_minutes(wave[:144 * 2 - 30], TODAY - timedelta(days=3)), "LAN-02")
    conn.execute("""
        INSERT INTO alarms_history (object_id, alarm_id, start_time, end_time)
        SELECT o.id, a.id, %(day)s - n * interval '1 day' + interval '2 h',
               %(day)s - n * interval '1 day' + a.manufacturer_id * interval '2 min'
          FROM objects o, alarms a, generate_series(1, 3) AS n""", {"day": TODAY})
    conn.execute(JOBS_SQL, {"evil": EVIL})
    conn.execute(STEPS_SQL, {"comment": f"no wind\x1b[2J at {EVIL}"})
    conn.execute(RUNNING_SQL, {"long": LONG})
    for description in ("nightly", f"{EVIL} {LONG}"):
        conn.execute(SCHEDULE_SQL, {"description": description, "start": START})
