-- Samples on another PostgreSQL server: feature_values as a foreign table, read through postgres_fdw.
--
--     python jobctl.py init
--     psql -1 -v host=history1 -v port=5432 -v dbname=history -v user=reader -f examples/own_tables_fdw.sql
--     python jobctl.py init
--
-- The other server has a table feature_values with these columns and an index on (object_id, feature_id,
-- timestamp). The conditions on them are sent there, so only the samples of a step come over.
-- The password: ALTER USER MAPPING ... OPTIONS (ADD password '...'), one for each role that runs handlers.

CREATE EXTENSION IF NOT EXISTS postgres_fdw;

CREATE SERVER sample_history
    FOREIGN DATA WRAPPER postgres_fdw
    OPTIONS (host :'host', port :'port', dbname :'dbname', fetch_size '10000');

CREATE USER MAPPING FOR CURRENT_USER SERVER sample_history OPTIONS (user :'user');

DROP TABLE feature_values;  -- fails if it is no table

CREATE FOREIGN TABLE feature_values (
    object_id   int               NOT NULL,
    feature_id  int               NOT NULL,
    timestamp   timestamptz       NOT NULL,
    value       double precision      NULL
) SERVER sample_history OPTIONS (schema_name 'public', table_name 'feature_values');
