"""No statement of the toolkit calls a function or operator that somebody else has slipped in.

Whoever may create objects in a schema on the search_path (in PostgreSQL 14 anybody, in public) can
make a function that fits a call better than PostgreSQL's own: format(text, bigint, bigint) is
nearer than format(text, VARIADIC "any"), and to jsonb ->> 'name' jsonb ->> jsonb is nearer than
jsonb ->> text. Here there is one for every call that leaves room, and each statement is read by
PostgreSQL as the body of a function, which remembers what it would call. Remedy: give the very
types (::text), or write pg_catalog.format.
"""

import importlib
import re
from pathlib import Path

import psycopg
import pytest

import doctor_schema
import samples_store

ROOT = Path(__file__).parents[1]
STATEMENT = re.compile(r"\s*(WITH|SELECT|INSERT|UPDATE|DELETE)\b")
PLACEHOLDER = re.compile(r"%\(\w+\)s|%s\b")

# Operators for every pair of types that PostgreSQL has none of its own for, and functions of the
# names that the statements call, where PostgreSQL's own take as many arguments and not just these.
MAKE_SQL = """
CREATE SCHEMA look_alike;
DO $make$
DECLARE
    types text[] := '{int2,int4,int8,float8,numeric,text,name,jsonb,timestamptz,interval,bool,oid,
                      regclass,tstzrange,tstzmultirange,text[],int4[]}';
    few text[] := '{int2,int4,int8,text}';
    operators text[] := string_to_array(
        '= <> < > <= >= + - * / || -> ->> ? @> <@ && ~~ ~~* !~~* ~ | <<', ' ');
    it record;
BEGIN
    FOR it IN SELECT a, b FROM unnest(types) AS a, unnest(types) AS b LOOP
        EXECUTE format('CREATE FUNCTION look_alike.f(%%s, %%s) RETURNS bool RETURN true',
                       it.a, it.b);
    END LOOP;
    FOR it IN
        SELECT op, a, b
          FROM unnest(operators) AS op, unnest(types) AS a, unnest(types) AS b
         WHERE to_regoperator(format('pg_catalog.%%s(%%s,%%s)', op, a, b)) IS NULL
    LOOP
        EXECUTE format('CREATE OPERATOR look_alike.%%s (LEFTARG = %%s, RIGHTARG = %%s, '
                       'FUNCTION = look_alike.f)', it.op, it.a, it.b);
    END LOOP;
    FOR it IN
        SELECT DISTINCT called.name, signature
          FROM unnest(%(names)s::text[]) AS called(name)
          JOIN pg_proc p ON p.proname = called.name AND p.pronamespace = 'pg_catalog'::regnamespace
          JOIN LATERAL (
                SELECT 1, a FROM unnest(types) AS a
                 UNION ALL
                SELECT 2, concat_ws(',', a, b) FROM unnest(types) AS a, unnest(types) AS b
                 UNION ALL
                SELECT 3, concat_ws(',', a, b, c)
                  FROM unnest(few) AS a, unnest(few) AS b, unnest(few) AS c
                 UNION ALL
                SELECT 4, concat_ws(',', a, b, c, d)
                  FROM unnest('{int8,text}'::text[]) AS a, unnest('{int8,text}'::text[]) AS b,
                       unnest('{int8,text}'::text[]) AS c, unnest('{int8,text}'::text[]) AS d
                ) AS made(count, signature) ON p.pronargs = made.count OR p.provariadic <> 0
         WHERE to_regprocedure(format('pg_catalog.%%I(%%s)', called.name, signature)) IS NULL
    LOOP
        EXECUTE format('CREATE FUNCTION look_alike.%%I(%%s) RETURNS bool RETURN true',
                       it.name, it.signature);
    END LOOP;
END $make$
"""

CALLED_SQL = """
WITH look_alike(classid, objid) AS (
    SELECT 'pg_proc'::regclass, oid FROM pg_proc WHERE pronamespace = 'look_alike'::regnamespace
     UNION ALL
    SELECT 'pg_operator'::regclass, oid FROM pg_operator
     WHERE oprnamespace = 'look_alike'::regnamespace
)
SELECT pg_describe_object(d.classid, d.objid, 0), pg_describe_object(refclassid, refobjid, 0)
  FROM pg_depend d
 WHERE (refclassid, refobjid) IN (SELECT classid, objid FROM look_alike)
   AND (classid, objid) NOT IN (SELECT classid, objid FROM look_alike)
"""


def statements():
    """Return {statement: module.constant} of all that stand in constants."""
    found = {}
    for path in sorted(ROOT.glob("*.py")):
        for name, value in vars(importlib.import_module(path.stem)).items():
            for text in value.values() if isinstance(value, dict) else [value]:
                if name.endswith("_SQL") and isinstance(text, str) and STATEMENT.match(text):
                    found.setdefault(text, f"{path.stem}.{name}")
    return found


@pytest.fixture(scope="module")
def conn(server, template):
    """A connection in a transaction that has made the look-alikes; all is rolled back."""
    everything = " ".join([doctor_schema.SCHEMA.read_text(), *statements()])
    names = set(re.findall(r"\b([a-z_0-9]+)\(", everything))
    with psycopg.connect(server.dsn(template)) as conn:
        conn.execute(samples_store.STAGING_SQL)  # one statement reads it
        psycopg.ClientCursor(conn).execute(MAKE_SQL, {"names": sorted(names)})
        conn.execute(samples_store.STAGING_SQL)  # a table that is there for a while only
        yield conn
        conn.rollback()


def called(conn, text, path):
    """Return what look-alikes a statement would call; `psycopg.Error` if it cannot be read."""
    body = PLACEHOLDER.sub("NULL", text).replace("%%", "%")
    with conn.transaction(force_rollback=True):
        conn.execute(f"SET LOCAL search_path = {path}")
        conn.execute(f"CREATE FUNCTION probe() RETURNS void BEGIN ATOMIC {body}; END")
        conn.execute("SET LOCAL search_path = public")
        return conn.execute(CALLED_SQL).fetchall()


@pytest.mark.parametrize("text", [
    pytest.param(text, id=name) for text, name in statements().items()])
def test_statements_call_nothing_but_postgresqls_own(conn, text):
    assert called(conn, text, "public") == []  # it can be read at all
    assert called(conn, text, "public, look_alike") == []


def test_views_checks_defaults_and_triggers_neither(conn):
    with conn.transaction(force_rollback=True):
        conn.execute("CREATE SCHEMA again; SET LOCAL search_path = again, look_alike")
        conn.execute(doctor_schema.SCHEMA.read_text())
        conn.execute("""
            INSERT INTO job_types (name, max_running) VALUES ('Noop', 1);
            INSERT INTO job_instances (job_type_id, last_state_change) VALUES (1, '2026-01-01');
            UPDATE job_instances SET state = 'Queued'""")
        assert conn.execute("""
            SELECT last_state_change > '2026-01-01'::timestamptz, job_type_has_room(1, 1)
              FROM job_instances""").fetchall() == [(True, True)]
        conn.execute("SET LOCAL search_path = public")
        assert conn.execute(CALLED_SQL).fetchall() == []
