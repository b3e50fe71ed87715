"""Is the database as schema.sql says? What differs, and the statement that mends it.

schema.sql is applied to the session's temporary schema, in a transaction that is rolled back, and
both are described by PostgreSQL itself: so types, defaults, constraints and views are compared in
one spelling on every version, and it takes no right but to create temporary tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psycopg

from doctor_database import Note
from perfdb import READ_ONLY, SCHEMA_VERSION, query

SCHEMA = Path(__file__).with_name("schema.sql")

#: relations that may also be views, foreign or partitioned tables of the site's own
PLANT = ("object_types", "object_models", "objects", "features", "feature_values", "alarms")

Thing = tuple[str, str]  # kind and name, e.g. ("constraint", "job_steps.step_columns_make_sense")

STATEMENT = re.compile(r"(?:--[^\n]*|\$\$.*?\$\$|'(?:[^']|'')*'|[^;'$-]|[$-])*?;", re.DOTALL)


def statements(text: str) -> list[str]:
    """Return the statements of an SQL script, without the comments before them."""
    return [re.sub(r"\A(\s+|--[^\n]*\n)*", "", match[0]) for match in STATEMENT.finditer(text)]


# Of some relations and functions, one row per thing that can be there, differ or be missing. The
# name of their own schema is left out, so that two schemas can be compared; before PostgreSQL 15
# the temporary one is pg_temp_3, say, and not pg_temp.
DESCRIBE_SQL = """
WITH relation AS (
    SELECT c.oid, c.relname::text AS name, c.relkind,
           quote_ident(n.nspname::text) || '.' AS prefix
      FROM pg_class c
      JOIN pg_namespace n ON n.oid = c.relnamespace
     WHERE c.oid = ANY(%(relations)s)
), thing AS (
    SELECT 'relation' AS kind, name, '' AS prefix,
           CASE relkind WHEN 'r' THEN 'table' WHEN 'v' THEN 'view'
                        WHEN 'p' THEN 'partitioned table' WHEN 'f' THEN 'foreign table'
                        ELSE 'materialized view' END AS definition
      FROM relation
     UNION ALL
    SELECT attribute.kind, name || '.' || attname::text, prefix, attribute.definition
      FROM relation
      JOIN pg_attribute a ON a.attrelid = oid AND a.attnum > 0 AND NOT a.attisdropped
      LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum
     CROSS JOIN LATERAL (VALUES
           ('type', format_type(a.atttypid, a.atttypmod)),
           ('not null', CASE WHEN a.attnotnull THEN 'NOT NULL' ELSE '' END),
           ('default', CASE WHEN a.attidentity <> '' THEN 'IDENTITY'
                            ELSE COALESCE(pg_get_expr(d.adbin, d.adrelid), '') END)
           ) AS attribute(kind, definition)
     UNION ALL
    SELECT 'constraint', name || '.' || conname::text, prefix, pg_get_constraintdef(k.oid)
      FROM relation
      JOIN pg_constraint k ON k.conrelid = relation.oid AND k.contype IN ('c', 'f', 'p', 'u', 'x')
     UNION ALL
    SELECT 'index', name || '.' || i.relname::text, prefix,
           pg_get_indexdef(x.indexrelid) || CASE WHEN x.indisvalid THEN '' ELSE ' -- INVALID' END
      FROM relation
      JOIN pg_index x ON x.indrelid = relation.oid
      JOIN pg_class i ON i.oid = x.indexrelid
     WHERE NOT EXISTS (SELECT FROM pg_constraint k WHERE k.conindid = x.indexrelid)
     UNION ALL
    SELECT 'trigger', name || '.' || tgname::text, prefix,
           pg_get_triggerdef(t.oid) || CASE WHEN t.tgenabled IN ('D', 'R') THEN ' -- DISABLED'
                                             ELSE '' END
      FROM relation
      JOIN pg_trigger t ON t.tgrelid = relation.oid AND NOT t.tgisinternal
     UNION ALL
    SELECT 'view', name, prefix, pg_get_viewdef(oid)
      FROM relation
     WHERE relkind = 'v'
     UNION ALL
    SELECT 'function', proname::text || '(' || oidvectortypes(proargtypes) || ')',
           quote_ident(n.nspname::text) || '.', pg_get_functiondef(p.oid)
      FROM pg_proc p
      JOIN pg_namespace n ON n.oid = p.pronamespace
     WHERE p.oid = ANY(%(functions)s)
)
SELECT kind, name, replace(replace(definition, prefix, ''), 'pg_temp.', '')
  FROM thing
 ORDER BY pg_catalog.array_position(%(kinds)s::text[], kind), name
"""
KINDS = ["relation", "type", "not null", "default", "constraint", "index", "function", "trigger",
         "view"]

# What the scratch copy consists of, by name; a function with the types of its arguments.
SCRATCH_SQL = """
SELECT ARRAY(SELECT oid FROM pg_class
              WHERE relnamespace = pg_my_temp_schema() AND relkind IN ('r', 'v')),
       ARRAY(SELECT relname::text FROM pg_class
              WHERE relnamespace = pg_my_temp_schema() AND relkind IN ('r', 'v')),
       ARRAY(SELECT oid FROM pg_proc WHERE pronamespace = pg_my_temp_schema()),
       ARRAY(SELECT proname::text || '(' || oidvectortypes(proargtypes) || ')'
               FROM pg_proc WHERE pronamespace = pg_my_temp_schema())
"""

# The same names as the session finds them, with its search_path.
FOUND_SQL = """
SELECT ARRAY(SELECT to_regclass(name)::oid FROM pg_catalog.unnest(%(relations)s::text[]) AS name
              WHERE to_regclass(name) IS NOT NULL),
       ARRAY(SELECT p.oid
               FROM pg_proc p
              WHERE pg_function_is_visible(p.oid)
                AND proname::text || '(' || oidvectortypes(proargtypes) || ')'
                    = ANY(%(functions)s))
"""


@dataclass(frozen=True)
class Difference:
    """A thing that is not as schema.sql says; `found` is None if it is not there at all."""

    kind: str
    name: str  # table.column, table.constraint, function(types) ...
    found: str | None
    wanted: str
    remedy: str

    @property
    def table(self) -> str:
        return self.name.partition(".")[0]

    @property
    def part(self) -> str:
        """The column, constraint, index or trigger of the table."""
        return self.name.partition(".")[2]

    def __str__(self) -> str:
        what = {"type": "column", "not null": "column", "default": "default of"}.get(
            self.kind, self.wanted if self.kind == "relation" else self.kind)
        if self.found is None:
            return f"{what} {self.name} is missing: {self.remedy}"
        if self.kind in ("view", "function", "trigger", "index"):
            return f"{what} {self.name} is not as in schema.sql: {self.remedy}"
        return (f"{what} {self.name} is {self.found or 'none'} and should be "
                f"{self.wanted or 'none'}: {self.remedy}")


def schema(connection: psycopg.Connection) -> Iterator[str]:
    """What `jobctl doctor` says of it."""
    version = installed_version(connection)
    if version != SCHEMA_VERSION:
        age, remedy = (("newer", "copy the new files here") if (version or 0) > SCHEMA_VERSION else
                       ("older", INIT))
        yield f"schema: version {version} is {age} than these files' {SCHEMA_VERSION}: {remedy}"
        return
    try:
        yield from (f"schema: {one}" for one in differences(connection))
    except psycopg.errors.InsufficientPrivilege:
        yield Note("schema: not compared with schema.sql, because this role may not make "
                   "temporary tables: GRANT TEMPORARY ON DATABASE to it")
    except psycopg.errors.ReadOnlySqlTransaction:
        if query(connection, "SELECT pg_is_in_recovery()")[0][0]:
            yield Note("schema: not compared with schema.sql on a standby; run doctor on the "
                       "primary")
        else:
            yield Note("schema: not compared with schema.sql, because sessions of this role are "
                       f"read only: {READ_ONLY}")


def installed_version(connection: psycopg.Connection) -> int | None:
    """Return the version of schema.sql that was applied last, None if there are no tables."""
    try:
        return query(connection, "SELECT job_schema_version()")[0][0]
    except psycopg.errors.UndefinedFunction:
        return None


@dataclass(frozen=True)
class Wanted:
    """What schema.sql makes, as this server describes it."""

    things: dict[Thing, str]
    names: dict[str, list[str]]  # of its relations and functions


def differences(connection: psycopg.Connection, wanted: Wanted | None = None) -> list[Difference]:
    """Return what of schema.sql is missing or different in the database; more may be there.

    `wanted` spares finding out again what schema.sql makes. Raise as `describe_wanted`.
    """
    wanted = wanted or describe_wanted(connection)
    found = _describe(connection, *query(connection, FOUND_SQL, wanted.names)[0])
    return list(_compare(wanted.things, found))


def describe_wanted(connection: psycopg.Connection) -> Wanted:
    """Return what schema.sql makes; nothing of it stays.

    Raise `psycopg.errors.InsufficientPrivilege` if the role may not create temporary tables,
    `psycopg.errors.ReadOnlySqlTransaction` on a standby.
    """
    # Functions are not found in a temporary schema unless it is named; comments are not compared.
    script = "".join(re.sub(r"EXECUTE FUNCTION (\w)", r"EXECUTE FUNCTION pg_temp.\1", statement)
                     for statement in statements(SCHEMA.read_text())
                     if not statement.startswith("COMMENT"))
    with connection.transaction(force_rollback=True):
        connection.execute("SET LOCAL search_path = pg_temp;" + script)
        oids, relations, function_oids, functions = query(connection, SCRATCH_SQL)[0]
        return Wanted(_describe(connection, oids, function_oids),
                      {"relations": relations, "functions": functions})


def _describe(connection: psycopg.Connection, relations: list[int],
              functions: list[int]) -> dict[Thing, str]:
    rows = query(connection, DESCRIBE_SQL,
                 {"relations": relations, "functions": functions, "kinds": KINDS})
    return {(kind, name): definition for kind, name, definition in rows}


def _compare(wanted: Mapping[Thing, str], found: Mapping[Thing, str]) -> Iterator[Difference]:
    for (kind, name), definition in wanted.items():
        actual = found.get((kind, name))
        if actual != definition and _matters(kind, name, wanted, found):
            yield Difference(kind, name, actual, definition, _remedy(kind, name, wanted, found))


def _matters(kind: str, name: str, wanted: Mapping[Thing, str],
             found: Mapping[Thing, str]) -> bool:
    """Whether a difference is to be told: the site's own plant relations need the columns only."""
    table = name.partition(".")[0]
    if kind == "function" or (kind == "relation" and table not in PLANT):
        return True
    there = found.get(("relation", table))
    if kind == "relation" or there is None:
        return kind == "relation" and there is None  # else it is told of the relation
    if there == wanted["relation", table]:
        aim = re.search(r"REFERENCES (\w+)", wanted[kind, name])
        return ((kind not in ("not null", "default") or ("type", name) in found)
                and not (aim and found.get(("relation", aim[1]), "table") != "table"))
    return table in PLANT and kind == "type" and not _serves_as(
        found.get((kind, name), ""), wanted[kind, name])


ALIKE = ({"smallint", "integer", "bigint"}, {"real", "double precision", "numeric"},
         {"text", "character varying", "character"}, {"smallint[]", "integer[]", "bigint[]"})


def _serves_as(found: str, wanted: str) -> bool:
    """Whether a column of a view may have the type `found` where the table's is `wanted`."""
    plain = re.sub(r"\(.*\)", "", found)  # numeric(10,2)
    return found == wanted or any({plain, wanted} <= alike for alike in ALIKE)


INIT = "python jobctl.py init"


def _remedy(kind: str, name: str, wanted: Mapping[Thing, str], found: Mapping[Thing, str]) -> str:
    """Return what to type; init mends what it can make anew without touching a row."""
    table, _, part = name.partition(".")
    definition, actual = wanted[kind, name], found.get((kind, name))
    there = found.get(("relation", table))
    alter = f"ALTER TABLE {table}"
    if kind == "relation" and there:
        return f"this one must be a {definition}: rename yours, then {INIT}"
    if kind == "type" and there not in (None, "table"):
        return f"let the {there} {table} show it"
    if kind == "type" and actual is None:
        rest = [wanted["not null", name], f"DEFAULT {wanted['default', name]}"]
        return " ".join([f"{alter} ADD COLUMN {part} {definition}", *(
            word for word in rest if word not in ("", "DEFAULT "))]).replace(*IDENTITY)
    if kind == "type":
        return (f"DROP VIEW IF EXISTS v_job_steps, v_job_instances; {alter} ALTER {part} TYPE "
                f"{definition} USING {part}::{definition}, then {INIT}, then GRANT on the views "
                "anew")
    if kind == "constraint" and actual == f"{definition} NOT VALID" and definition[:5] == "CHECK":
        look = f"SELECT * FROM {table} WHERE NOT {definition[6:]}"  # noqa: S608
        return f"rows do not fit it, {look} shows them: mend them, then {INIT}"
    if kind == "constraint":
        drop = f"DROP CONSTRAINT {part}, " if actual else ""
        return f"{alter} {drop}ADD CONSTRAINT {part} {definition}"
    if kind == "not null":
        return f"{alter} ALTER {part} {'SET' if definition else 'DROP'} NOT NULL"
    if kind == "default":
        return _default_remedy(alter, part, actual, definition)
    return INIT


IDENTITY = ("DEFAULT IDENTITY", "GENERATED BY DEFAULT AS IDENTITY")


def _default_remedy(alter: str, column: str, found: str | None, wanted: str) -> str:
    if wanted == "IDENTITY":
        table = alter.split()[-1]
        drop = f"ALTER {column} DROP DEFAULT, " if found else ""
        return (f"{alter} {drop}ALTER {column} ADD GENERATED BY DEFAULT AS "  # noqa: S608
                f"IDENTITY; SELECT setval(pg_get_serial_sequence('{table}', '{column}'), "
                f"max({column})) FROM {table}")
    if found == "IDENTITY":
        return f"{alter} ALTER {column} DROP IDENTITY"
    return f"{alter} ALTER {column} " + (f"SET DEFAULT {wanted}" if wanted else "DROP DEFAULT")
