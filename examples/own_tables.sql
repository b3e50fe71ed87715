-- Samples that are in PostgreSQL already, in a table of your own: seen as feature_values, without a copy.
--
--     python jobctl.py init                       makes all tables
--     psql -1 -f examples/own_tables.sql          puts this view in the place of the empty feature_values
--     python jobctl.py init                       leaves it as it is; says which columns it lacks
--
-- object_types, object_models, objects, features and alarms may be views likewise; alarms_history and
-- alarms_detected are written to and must be tables.

-- Yours: a logger that writes a wide row per turbine and ten minutes.
CREATE TABLE IF NOT EXISTS scada_10min (
    turbine       text         NOT NULL,
    measured_at   timestamptz  NOT NULL,  -- end of the ten minutes
    wind_speed    real             NULL,
    active_power  real             NULL,

    PRIMARY KEY (turbine, measured_at)
);

DROP TABLE feature_values;  -- fails if it is no table

-- A SELECT per signal: asked for one signal of one turbine, PostgreSQL reads that SELECT only, by the
-- primary key. A list of (name, value) pairs joined to each row would make it read them all.
CREATE VIEW feature_values AS
SELECT o.id                            AS object_id,
       f.id                            AS feature_id,
       s.measured_at                   AS timestamp,
       s.wind_speed::double precision  AS value
  FROM scada_10min s
  JOIN objects o  ON o.name = s.turbine
  JOIN features f ON f.object_model_id = o.object_model_id AND f.name = 'wind_speed'
 UNION ALL
SELECT o.id, f.id, s.measured_at, s.active_power::double precision
  FROM scada_10min s
  JOIN objects o  ON o.name = s.turbine
  JOIN features f ON f.object_model_id = o.object_model_id AND f.name = 'active_power';
