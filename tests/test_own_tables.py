"""Plant tables of one's own, as views, foreign or partitioned tables: left alone, and read."""

import re
from pathlib import Path

import pytest
from park import add_samples, every_ten_minutes, history, make_park, trigger
from psycopg.conninfo import conninfo_to_dict

import alarm_calc  # noqa: F401  its type
import control
import jobctl

EXAMPLES = Path(__file__).parents[1] / "examples"
ALARMS = {111: (trigger("high", "wind_speed", 10), []),
          112: (trigger("low", "active_power", 5), [111])}
WIND = {"LAN-01": [9, 11, 12, 9, None, 11, 8, 7, 12],
        "LAN-02": [12, 3, 4, 12, 12, 12, 1, None, 12]}
POWER = {"LAN-01": [1, 1, 9, 2, 3, None, 4, 9, 1], "LAN-02": [9, 9, 1, 1, 1, 9, 9, 9, 9]}

WIDE_SQL = """
INSERT INTO scada_10min (turbine, measured_at, wind_speed, active_power)
SELECT o.name, timestamp, max(value) FILTER (WHERE feature_id = 1),
                          max(value) FILTER (WHERE feature_id = 2)
  FROM feature_values_plain
  JOIN objects o ON o.id = object_id
 GROUP BY 1, 2
"""


@pytest.fixture
def plain(conn):
    """A park with samples in the plain tables, and a copy of them."""
    make_park(conn, alarms=ALARMS)
    for name in WIND:
        add_samples(conn, every_ten_minutes(WIND[name]), name, 1)
        add_samples(conn, every_ten_minutes(POWER[name]), name, 2)
    conn.execute("CREATE TABLE feature_values_plain AS SELECT * FROM feature_values")
    return conn


@pytest.fixture
def calculate(conn, run_handler):
    def calculate():
        conn.execute("DELETE FROM alarms_history")
        if conn.execute("SELECT 1 FROM pg_class WHERE relname = 'alarms_detected'").fetchone():
            conn.execute("DELETE FROM alarms_detected")
        job_id = control.create_job(conn, "Alarm Calculation", {
            "object_names": list(WIND), "alarm_ids": list(ALARMS),
            "start": "2026-03-01 00:00:00", "end": "2026-03-02 00:00:00"})
        run_handler("--once")
        job = conn.execute("SELECT state, comment FROM job_instances WHERE id = %s", [job_id])
        assert job.fetchone() == {"state": "Finished", "comment": None}
        return history(conn)
    return calculate


def wide_view(conn, dsn):
    conn.execute((EXAMPLES / "own_tables.sql").read_text())
    conn.execute(WIDE_SQL)


def another_server(conn, dsn):
    if not conn.execute("SELECT 1 FROM pg_available_extensions "
                        "WHERE name = 'postgres_fdw'").fetchone():
        pytest.skip("this PostgreSQL comes without postgres_fdw")
    where = conninfo_to_dict(dsn)
    script = (EXAMPLES / "own_tables_fdw.sql").read_text()
    script = script.replace("table_name 'feature_values'", "table_name 'feature_values_plain'")
    for name in "host", "port", "dbname", "user":
        script = script.replace(f":'{name}'", f"'{where[name]}'")
    conn.execute(script)
    assert conn.execute("SELECT 1 FROM pg_foreign_table").fetchone()


def all_views(conn, dsn):
    """The site's tables are in a schema of its own, with other types here and there."""
    conn.execute("CREATE SCHEMA site; ALTER TABLE feature_values SET SCHEMA site")
    for table in "alarms", "features", "objects", "object_models", "object_types":
        conn.execute(f"ALTER TABLE {table} SET SCHEMA site;"
                     f"CREATE VIEW {table} AS SELECT * FROM site.{table}")
    conn.execute("CREATE VIEW feature_values AS SELECT object_id::bigint, feature_id::smallint, "
                 "timestamp, value::numeric(20, 6) FROM site.feature_values")


def partitions(conn, dsn):
    conn.execute("""
        DROP TABLE feature_values;
        CREATE TABLE feature_values (
            LIKE feature_values_plain,
            PRIMARY KEY (object_id, feature_id, timestamp) INCLUDE (value)
        ) PARTITION BY RANGE (timestamp);
        CREATE TABLE march PARTITION OF feature_values
           FOR VALUES FROM ('2026-03-01') TO ('2026-04-01');
        INSERT INTO feature_values SELECT * FROM feature_values_plain""")


@pytest.mark.parametrize("replace", [wide_view, another_server, all_views, partitions])
def test_the_alarms_are_those_of_the_plain_tables(plain, dsn, calculate, capsys, replace):
    assert jobctl.main(["init"]) == 0
    expected = calculate()
    assert len(expected) > 6
    replace(plain, dsn)
    kinds = plain.execute("SELECT relname, relkind FROM pg_class ORDER BY oid").fetchall()
    assert jobctl.main(["init"]) == 0, capsys.readouterr()
    assert plain.execute("SELECT relname, relkind FROM pg_class ORDER BY oid").fetchall() == kinds
    assert calculate() == expected
    for command in ["list"], ["show", "2"], ["types"], ["stats"]:
        assert jobctl.main(command) == 0
    assert "LAN-02 / alarm 112" in capsys.readouterr().out
    jobctl.main(["doctor"])
    assert "schema:" not in capsys.readouterr().out


def test_a_new_database_grows_around_views(conn, capsys):
    conn.execute("""
        DROP SCHEMA public CASCADE;
        CREATE SCHEMA public;
        CREATE TABLE turbines (id int, name text, type text);
        CREATE VIEW object_models AS SELECT 1 AS id, 1 AS object_type_id, 'G97'::text AS name;
        CREATE VIEW objects AS
        SELECT id, 1 AS object_model_id, name, NULL::int AS parent_id, NULL::text AS bazefield_id
          FROM turbines""")
    assert jobctl.main(["init"]) == 0, capsys.readouterr()
    kinds = dict(tuple(row.values()) for row in conn.execute(
        "SELECT relname, relkind FROM pg_class "
        "WHERE relname IN ('objects', 'features', 'alarms')"))
    assert kinds == {"objects": "v", "features": "r", "alarms": "r"}
    assert jobctl.main(["init"]) == 0


def test_missing_columns_are_named_with_what_to_do(conn, capsys):
    conn.execute("""
        DROP VIEW v_job_steps;
        DROP TABLE features, feature_values;
        CREATE VIEW features AS
        SELECT 1 AS id, 1 AS object_model_id, ''::text AS name, interval '1 h' AS sample_interval;
        CREATE VIEW feature_values AS
        SELECT 1 AS object_id, 1 AS feature_id, now()::timestamp AS timestamp, 1.0 AS value""")
    assert jobctl.main(["init"]) == 1
    assert re.findall("jobctl: (.*)", capsys.readouterr().err) == [
        "column feature_values.timestamp is timestamp without time zone and should be timestamp "
        "with time zone: let the view feature_values show it",
        "column features.unit is missing: let the view features show it"]
