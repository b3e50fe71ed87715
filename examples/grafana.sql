-- Panels for Grafana (data source: PostgreSQL, a role that may only look). One query per panel.
-- $__timeFilter and $__timeGroup are Grafana's; the rest runs in psql as it stands.

-- Running jobs (table)
SELECT id, job_type, description, round(100 * progress) AS percent, steps_failed, running_step,
       running_step_since, running_time, worker_host
  FROM v_job_instances
 WHERE id IN (SELECT id FROM job_instances WHERE worker_id IS NOT NULL)
 ORDER BY id;

-- Waiting jobs per type (stat)
SELECT t.name, count(*) AS waiting, min(j.created) AS oldest
  FROM job_instances j
  JOIN job_types t ON t.id = j.job_type_id
 WHERE j.state IN ('Created', 'Queued')
   AND j.worker_id IS NULL
 GROUP BY t.name
 ORDER BY t.name;

-- Ended jobs per hour and state (time series)
-- In Grafana: WHERE $__timeFilter(finished) GROUP BY $__timeGroup(finished, '1h'), state
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
