"""jobctl init makes nobody wait; doctor says what differs from schema.sql and how to mend it."""

import re
import threading
from pathlib import Path

import psycopg
import pytest
from helpers import wait_for

import doctor_schema
import jobctl
import perfdb
import upgrade

VERSION_1 = (Path(__file__).parent / "schema_1.sql").read_text()
LATEST_CHANGE_SQL = """
SELECT max(xmin::text::bigint) AS latest
  FROM (SELECT xmin FROM pg_class UNION ALL SELECT xmin FROM pg_proc
         UNION ALL SELECT xmin FROM pg_trigger
         UNION ALL SELECT xmin FROM pg_constraint UNION ALL SELECT xmin FROM pg_description
         UNION ALL SELECT xmin FROM job_types UNION ALL SELECT xmin FROM job_states) AS rows
"""
LOCK_ALL_SQL = """
LOCK TABLE job_types, job_schedules, job_instances, job_steps, job_workers, objects, features,
           feature_values, alarms, alarms_history, v_job_instances, v_job_steps
        IN SHARE ROW EXCLUSIVE MODE
"""


@pytest.fixture
def empty(conn):
    """A connection to a database without our tables."""
    conn.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    return conn


@pytest.fixture
def version_1(empty):
    """The tables of version 1, with a job that nobody could show."""
    empty.execute(VERSION_1)
    empty.execute("""
        INSERT INTO job_types (name, retry_delay) VALUES ('Noop', '200 years');
        INSERT INTO job_instances (job_type_id, description, run_after) VALUES
               (1, 'never', 'infinity'), (1, 'always', '-infinity'),
               (1, 'late', '20000-01-01'), (1, 'now', now());
        INSERT INTO job_steps (job_instance_id, position, state, started, finished) VALUES
               (4, 1, 'Finished', now(), now());
        INSERT INTO job_schedules (job_type_id, every, next_start)
        VALUES (1, '1 day', '2026-01-31');
        INSERT INTO alarms_history (object_id, alarm_id, start_time, end_time)
        VALUES (1, 1, '2026-03-01', '2026-03-02')""")
    return empty


def init(capsys, *args):
    status = jobctl.main(["init", *args])
    return status, capsys.readouterr().err


def test_nothing_to_do_locks_nothing_and_writes_nothing(dsn, conn, capsys, monkeypatch):
    assert init(capsys) == (0, "")
    before = conn.execute(LATEST_CHANGE_SQL).fetchone()
    with psycopg.connect(dsn) as other:
        other.execute(LOCK_ALL_SQL)
        other.execute(upgrade.TAKE_TURN_SQL)
        monkeypatch.setattr(upgrade, "PAUSE_SECONDS", "nobody waits")
        assert init(capsys) == (0, "")
    assert conn.execute(LATEST_CHANGE_SQL).fetchone() == before


def test_a_new_database_gets_all_or_nothing(empty, capsys, monkeypatch, tmp_path):
    script = upgrade.SCHEMA.read_text()
    (tmp_path / "schema.sql").write_text(
        script.replace("CREATE OR REPLACE VIEW v_job_steps", "CREATE VIEW a.b"))
    with monkeypatch.context() as broken:
        broken.setattr(upgrade, "SCHEMA", tmp_path / "schema.sql")
        assert init(capsys)[0] == 1
    assert empty.execute("SELECT relname FROM pg_class "
                         "WHERE relnamespace = 'public'::regnamespace").fetchall() == []
    assert init(capsys) == (0, "")
    assert doctor_schema.differences(empty) == []


def test_two_at_once_take_turns(empty, dsn):
    def make():
        with perfdb.connect(dsn) as connection:
            left.append(upgrade.upgrade(connection))
    left = []
    threads = [threading.Thread(target=make) for _ in range(3)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert left == [[], [], []]


def test_an_upgrade_keeps_the_rows_and_ends_like_a_new_database(version_1, capsys):
    status, said = init(capsys)
    assert (status, "LEFT" in said) == (0, False), said
    assert doctor_schema.differences(version_1) == []
    years = version_1.execute("SELECT extract(year FROM run_after)::int AS year "
                              "FROM v_job_instances ORDER BY id LIMIT 3").fetchall()
    assert [row["year"] for row in years] == [3000, 1900, 3000]
    assert version_1.execute("SELECT state FROM v_job_steps").fetchall() == [{"state": "Finished"}]
    assert version_1.execute("SELECT count(*) AS n FROM job_schedules").fetchone() == {"n": 1}
    assert init(capsys) == (0, "")


def test_nobody_waits_for_an_upgrade(version_1, dsn, capsys, monkeypatch):
    """A front end inserts meanwhile; somebody has read the view and left his transaction open."""
    monkeypatch.setattr(upgrade, "PAUSE_SECONDS", 0.01)
    said, asked, stop = [], [], threading.Event()
    monkeypatch.setattr(upgrade, "say", said.append)

    def ask():
        limited = "-c statement_timeout=5s"
        with psycopg.connect(dsn, autocommit=True, options=limited) as connection:
            while not stop.is_set():
                connection.execute("INSERT INTO job_instances (job_type_id, description) "
                                   "VALUES (1, 'asked meanwhile')")
                connection.execute("SELECT id FROM v_job_instances LIMIT 1")
                asked.append(1)

    def make():
        with perfdb.connect(dsn) as connection:
            left.append(upgrade.upgrade(connection))

    left = []
    threads = [threading.Thread(target=ask), threading.Thread(target=make)]
    with psycopg.connect(dsn, application_name="the reader") as reader:
        reader.execute("SELECT id FROM v_job_instances")
        for thread in threads: thread.start()
        wait_for(lambda: any(" is in use by session" in line for line in said))
        before = len(asked)
        wait_for(lambda: len(asked) > before + 20)
        assert left == []
    threads[1].join()
    stop.set()
    threads[0].join()
    assert left == [[]]
    assert "(postgres, the reader, in a transaction since" in " ".join(said)
    assert version_1.execute("SELECT count(*) AS n FROM job_instances WHERE description = "
                             "'asked meanwhile'").fetchone() == {"n": len(asked)}


def test_rows_that_do_not_fit_are_told_with_how_to_find_them(version_1, capsys):
    version_1.execute("""
        INSERT INTO job_instances (job_type_id, created) VALUES (1, 'infinity');
        INSERT INTO object_types (name) VALUES ('turbine');
        INSERT INTO object_models (object_type_id, name) VALUES (1, 'G97');
        INSERT INTO features (object_model_id, name, sample_interval)
        VALUES (1, 'wind', '200 years')""")
    for _ in range(2):
        status, said = init(capsys)
        found = [line for line in said.splitlines() if "rows do not fit it" in line]
        assert (status, len(found)) == (1, 2), said
    for line in found:
        select = line[line.index("SELECT * FROM"):line.index(" shows them")]
        assert version_1.execute(select).rowcount == 1
    version_1.execute("UPDATE features SET sample_interval = '10 minutes';"
                      "UPDATE job_instances SET created = now()")
    assert init(capsys) == (0, "")
    assert doctor_schema.differences(version_1) == []


def test_patience_ends_and_the_next_call_goes_on(version_1, dsn, capsys, monkeypatch):
    monkeypatch.setattr(upgrade, "PATIENCE_SECONDS", 0)
    with psycopg.connect(dsn) as reader:
        reader.execute("SELECT id FROM v_job_instances")
        status, said = init(capsys)
        assert (status, " is still in use by session" in said) == (1, True), said
    assert init(capsys)[0] == 0
    assert init(capsys) == (0, "")


def test_tables_of_a_newer_version_are_left_alone(conn, capsys):
    conn.execute("CREATE OR REPLACE FUNCTION job_schema_version() RETURNS int RETURN 99")
    assert init(capsys) == (1, "jobctl: the tables are of version 99, these files of "
                               f"{perfdb.SCHEMA_VERSION}: copy the new files here\n")


# What differs, and whether init mends it by itself.
BY_INIT, BY_HAND = True, False


@pytest.mark.parametrize(("change", "said", "by_init"), [
    ("DROP TABLE job_schedules", "table job_schedules is missing", BY_INIT),
    ("DROP VIEW v_job_instances", "view v_job_instances is missing", BY_INIT),
    ("DROP VIEW v_job_instances; CREATE VIEW v_job_instances AS SELECT 1::bigint AS id",
     "view v_job_instances is not as in schema.sql", BY_INIT),
    ("""DO $$ BEGIN
            EXECUTE 'CREATE OR REPLACE VIEW v_job_steps AS '
                    || replace(pg_get_viewdef('v_job_steps'::regclass), 'LEFT JOIN', 'JOIN');
        END $$""", "view v_job_steps is not as in schema.sql", BY_INIT),
    ("DROP INDEX job_instances_taken_idx",
     "index job_instances.job_instances_taken_idx is missing", BY_INIT),
    ("DROP INDEX job_instances_taken_idx; "
     "CREATE INDEX job_instances_taken_idx ON job_instances (worker_id)",
     "index job_instances.job_instances_taken_idx is not as in schema.sql", BY_INIT),
    ("UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'objects_parent_idx'::regclass",
     "index objects.objects_parent_idx is not as in schema.sql", BY_INIT),
    ("CREATE OR REPLACE FUNCTION job_type_has_room(job_type_id int, max_running int) "
     "RETURNS boolean RETURN true",
     "function job_type_has_room(integer, integer) is not as in schema.sql", BY_INIT),
    ("DROP TRIGGER job_instances_created ON job_instances",
     "trigger job_instances.job_instances_created is missing", BY_INIT),
    ("ALTER TABLE job_instances DISABLE TRIGGER job_instances_state_changed",
     "trigger job_instances.job_instances_state_changed is not as in schema.sql", BY_INIT),
    ("ALTER TABLE job_steps DROP CONSTRAINT step_columns_make_sense",
     "constraint job_steps.step_columns_make_sense is missing", BY_INIT),
    ("ALTER TABLE job_types DROP CONSTRAINT job_type_max_attempts_is_positive, "
     "ADD CONSTRAINT job_type_max_attempts_is_positive CHECK (max_attempts > 7) NOT VALID",
     "constraint job_types.job_type_max_attempts_is_positive is CHECK ((max_attempts > 7)) NOT",
     BY_INIT),
    ("ALTER TABLE job_steps DROP CONSTRAINT job_steps_job_instance_id_fkey",
     "constraint job_steps.job_steps_job_instance_id_fkey is missing", BY_INIT),
    ("ALTER TABLE job_steps DROP CONSTRAINT step_position_is_taken_once",
     "constraint job_steps.step_position_is_taken_once is missing", BY_HAND),
    ("ALTER TABLE job_steps DROP COLUMN result CASCADE",
     "column job_steps.result is missing", BY_HAND),
    ("ALTER TABLE job_types DROP COLUMN max_attempts CASCADE",
     "column job_types.max_attempts is missing", BY_HAND),
    ("ALTER TABLE job_types ALTER description TYPE varchar",
     "column job_types.description is character varying and should be text", BY_HAND),
    ("ALTER TABLE objects ALTER parent_id SET NOT NULL",
     "column objects.parent_id is NOT NULL", BY_HAND),
    ("ALTER TABLE objects ALTER name DROP NOT NULL",
     "column objects.name is none and should be NOT NULL", BY_HAND),
    ("ALTER TABLE job_types ALTER max_attempts SET DEFAULT 7",
     "default of job_types.max_attempts is 7 and should be 1", BY_HAND),
    ("ALTER TABLE alarms_history ALTER id DROP IDENTITY",
     "default of alarms_history.id is none", BY_HAND),
    ("ALTER TABLE job_instances ALTER comment SET DEFAULT ''",
     "default of job_instances.comment is ''::text", BY_HAND),
    ("DROP TABLE alarms_history; CREATE VIEW alarms_history AS SELECT 1 AS id",
     "table alarms_history is view and should be table: this one must be a table", None),
])
def test_what_differs_is_said_and_the_remedy_works(conn, wanted, change, said, by_init):
    conn.execute(change)
    found = doctor_schema.differences(conn, wanted)
    (one,) = [one for one in found if str(one).startswith(said)]
    if by_init is None:
        return
    assert (upgrade.upgrade(conn) == []) is by_init
    if not by_init:
        conn.execute(re.sub(", then.*", "", one.remedy))
        assert upgrade.upgrade(conn) == []


@pytest.fixture(scope="module")
def wanted(server, template):
    with perfdb.connect(server.dsn(template)) as connection:
        return doctor_schema.describe_wanted(connection)


def test_what_the_site_adds_is_its_own(conn):
    conn.execute("""
        ALTER TABLE objects ADD COLUMN latitude real NOT NULL DEFAULT 0;
        CREATE INDEX ON alarms_history (start_time);
        CREATE VIEW open_jobs AS SELECT * FROM v_job_instances WHERE finished IS NULL;
        ALTER TABLE job_instances ADD CONSTRAINT site_rule CHECK (priority < 100);
        ALTER TABLE job_steps SET (fillfactor = 70)""")
    assert doctor_schema.differences(conn) == []


def test_it_is_compared_wherever_the_tables_are(empty, dsn, capsys, monkeypatch):
    empty.execute('CREATE SCHEMA "Wind Parks"')
    monkeypatch.setenv("PGOPTIONS", '-c search_path="Wind\\ Parks"')
    assert init(capsys) == (0, "")
    assert init(capsys) == (0, "")
    assert empty.execute("SELECT schemaname FROM pg_views WHERE viewname = 'v_job_steps'"
                         ).fetchall() == [{"schemaname": "Wind Parks"}]


def test_a_view_that_must_be_made_anew_keeps_its_grants(conn):
    conn.execute("DROP VIEW v_job_instances; CREATE VIEW v_job_instances AS SELECT 1 AS one;"
                 "CREATE ROLE \"On looker\" LOGIN;"
                 "GRANT SELECT ON v_job_instances TO \"On looker\", PUBLIC")
    rights_sql = "SELECT relacl::text FROM pg_class WHERE relname = 'v_job_instances'"
    before = conn.execute(rights_sql).fetchone()
    try:
        assert upgrade.upgrade(conn) == []
        assert conn.execute(rights_sql).fetchone() == before
    finally:
        conn.execute("DROP OWNED BY \"On looker\"; DROP ROLE \"On looker\"")


def test_a_role_that_may_only_look_can_compare(conn, dsn):
    conn.execute("CREATE ROLE onlooker LOGIN")
    try:
        with perfdb.connect(psycopg.conninfo.make_conninfo(dsn, user="onlooker")) as look:
            assert doctor_schema.differences(look) == []
    finally:
        conn.execute("DROP ROLE onlooker")


def test_statements_are_taken_apart():
    text = ("-- a; b\nSELECT ';' AS a; -- c\n\nDO $$ BEGIN x := 'a;b'; END $$;\n"
            "SELECT 'it''s;', b - c, $1;")
    assert doctor_schema.statements(text) == [
        "SELECT ';' AS a;", "DO $$ BEGIN x := 'a;b'; END $$;", "SELECT 'it''s;', b - c, $1;"]
