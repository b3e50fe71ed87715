-- Panels for Grafana (data source: PostgreSQL, a role that may only look). One query per panel, each
-- runs in psql and in Grafana as it stands. To follow Grafana's time range write $__timeFilter(finished)
-- for the condition on finished.

-- Running jobs (table)
SELECT id, job_type, description, round(100 * progress) AS percent, steps_failed, running_step,
       running_step_since, running_time, worker_host
  FROM v_job_instances
 WHERE id IN (SELECT id FROM job_instances WHERE worker_id IS NOT NULL)
 ORDER BY id;

-- Due jobs per type, and how long the oldest waits (stat)
SELECT t.name, count(*) AS waiting,
       extract(epoch FROM now() - min(GREATEST(j.created, j.run_after))) AS oldest_seconds
  FROM job_instances j
  JOIN job_types t ON t.id = j.job_type_id
 WHERE j.state IN ('Created', 'Queued')
   AND j.worker_id IS NULL
   AND j.run_after <= now()
 GROUP BY t.name
 ORDER BY t.name;

-- Ended jobs per hour and state (time series)
SELECT date_trunc('hour', finished) AS time, state, count(*) AS jobs
  FROM job_instances
 WHERE finished > now() - interval '1 day'
 GROUP BY 1, 2
 ORDER BY 1, 2;

-- The latest errors (table)
SELECT s.finished, s.job_instance_id, s.name, s.comment
  FROM v_job_steps s
 WHERE s.state = 'Failed'
   AND s.job_instance_id IN (SELECT id FROM job_instances WHERE state = 'Failed' ORDER BY id DESC LIMIT 50)
 ORDER BY s.finished DESC
 LIMIT 50;
