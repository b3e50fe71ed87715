"""Bring the tables to what schema.sql says, and let nobody stand still meanwhile (jobctl init)."""

from __future__ import annotations

import contextlib
import re
import sys
import time
from collections.abc import Iterator

import psycopg

from doctor_schema import (
    PLANT,
    SCHEMA,
    Difference,
    Thing,
    Wanted,
    describe_wanted,
    differences,
    installed_version,
    statements,
)
from perfdb import SCHEMA_VERSION, query

LOCK_TIMEOUT = "100ms"   # so long others queue behind us, where what we want to lock is in use
PAUSE_SECONDS = 1.0      # and so long it is theirs then
PATIENCE_SECONDS = 300.0


def upgrade(connection: psycopg.Connection) -> list[Difference]:
    """Make the tables, or change them to schema.sql's version; return what is left to be mended.

    Where all is as it should be nothing is written and nothing locked. Whatever is in use is tried
    again each second, for minutes, with a line on stderr; what was done by then stays, and the
    next call goes on from there. Relations of the site's own (views, foreign tables) are left.

    Raise `ValueError` if the tables are of a newer version, `psycopg.errors.LockNotAvailable` if
    patience ends.
    """
    wanted = describe_wanted(connection)
    if _is_current(connection, wanted):
        return []
    # A column that somebody has dropped ends it early: it is the first to be told of.
    with _turn(connection), contextlib.suppress(psycopg.errors.UndefinedColumn):
        if not _is_current(connection, wanted):
            _apply(connection, wanted)
            _mend_constraints(connection, wanted)
    return differences(connection, wanted)


def _is_current(connection: psycopg.Connection, wanted: Wanted) -> bool:
    version = installed_version(connection)
    if version and version > SCHEMA_VERSION:
        raise ValueError(f"the tables are of version {version}, these files of {SCHEMA_VERSION}: "
                         "copy the new files here")
    return version == SCHEMA_VERSION and not differences(connection, wanted)


TAKE_TURN_SQL = "SELECT pg_try_advisory_lock(hashtext('job_schema_version')::bigint)"
TURN_OVER_SQL = "SELECT pg_advisory_unlock(hashtext('job_schema_version')::bigint)"


@contextlib.contextmanager
def _turn(connection: psycopg.Connection) -> Iterator[None]:
    """Let two that upgrade at once take turns; the second then finds nothing to do.

    It tries instead of waiting: an index is built only when all statements from before have ended.
    """
    while not query(connection, TAKE_TURN_SQL)[0][0]:
        time.sleep(PAUSE_SECONDS)
    connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}'")
    try:
        yield
    finally:
        with contextlib.suppress(psycopg.OperationalError):  # lost, and the turn with it
            connection.execute("SET lock_timeout = 0")
            connection.execute(TURN_OVER_SQL)


OWN_SQL = """
SELECT name
  FROM pg_catalog.unnest(%(names)s::text[]) AS name
  JOIN pg_class c ON c.oid = to_regclass(name)::oid
 WHERE c.relkind <> 'r'
"""


def _apply(connection: psycopg.Connection, wanted: Wanted) -> None:
    own = [name for (name,) in query(connection, OWN_SQL, {"names": list(PLANT)})]
    to_own = re.compile(rf"REFERENCES ({'|'.join(own) or '-'}) \(\w+\)")  # no view can be its aim
    script = [to_own.sub("", statement) for statement in statements(SCHEMA.read_text())
              if _target(statement)[1].partition(".")[0] not in own]
    if installed_version(connection) is None:
        _refuse_no_room(connection)
        with connection.transaction():  # all or nothing: nobody can be in the way
            for statement in script:
                connection.execute(statement)
        return
    wrong = {(one.kind, one.name): one for one in differences(connection, wanted)}
    for statement in script:
        kind, name = target = _target(statement)
        table = name.partition(".")[0]
        if kind == "old index":
            _insist(connection, statement.replace("INDEX", "INDEX CONCURRENTLY", 1), table)
        elif kind == "index" and target in wrong:
            _make_index(connection, statement, wrong[target])
        elif kind == "view" and target in wrong:
            _replace_view(connection, statement, table)
        elif kind == "other" or target in wrong or ("relation", table) in wrong:
            _insist(connection, statement, table)


ROOM_SQL = """
SELECT current_setting('search_path'), current_user::text, current_schema()::text,
       COALESCE(has_schema_privilege(current_schema()::text, 'CREATE'), false)
"""


def _refuse_no_room(connection: psycopg.Connection) -> None:
    """Raise `ValueError` where the session may make no tables, saying what is missing."""
    path, role, schema, may_create = query(connection, ROOM_SQL)[0]
    if schema is None:
        raise ValueError(f"search_path is {path!r} and names no schema that is there and that "
                         f"{role} may use: CREATE SCHEMA or GRANT USAGE ON SCHEMA, or ALTER ROLE "
                         f"{role} SET search_path")
    if not may_create:
        raise ValueError(f"{role} may make no tables in schema {schema}, the first of "
                         f"search_path {path!r}: GRANT CREATE ON SCHEMA {schema} TO {role}")


# What a statement makes, by which it is found among the differences: it may be left out if it is
# not there, because it would lock what it finds. The others look for themselves, or lock nothing.
TARGETS = [(kind, re.compile(pattern)) for kind, pattern in (
    ("index", r"CREATE (?:UNIQUE )?INDEX IF NOT EXISTS (?P<part>\w+)\s+ON (?P<table>\w+)"),
    ("old index", r"DROP INDEX IF EXISTS (?P<table>\w+)"),
    ("trigger", r"CREATE OR REPLACE TRIGGER (?P<part>\w+)\s[^;]*?\sON (?P<table>\w+)"),
    ("view", r"CREATE OR REPLACE VIEW (?P<table>\w+)"),
    ("type", r"ALTER TABLE (?P<table>\w+)\s+ADD COLUMN IF NOT EXISTS (?P<part>\w+)"),
    ("default", r"ALTER TABLE (?P<table>\w+) ALTER COLUMN (?P<part>\w+)"),
    ("other", r"(?:COMMENT ON (?:TABLE|COLUMN|VIEW)|ALTER TABLE)\s+(?P<table>\w+)"))]


def _target(statement: str) -> Thing:
    """Return the kind and the name of what a statement makes, as `doctor_schema` has them."""
    for kind, pattern in TARGETS:
        if match := pattern.match(statement):
            found = match.groupdict()
            return kind, found["table"] + (f".{found['part']}" if "part" in found else "")
    return "other", ""


def _make_index(connection: psycopg.Connection, statement: str, wrong: Difference) -> None:
    """Build an index while everybody goes on; another of that name, or half of one, goes first."""
    if wrong.found is not None:
        _insist(connection, f"DROP INDEX CONCURRENTLY {wrong.part}", wrong.part)
    say(f"building index {wrong.part}: it waits for changes that are open now, and nobody for it")
    connection.execute("SET lock_timeout = 0")  # in vain would be dear
    connection.execute(statement.replace("INDEX", "INDEX CONCURRENTLY", 1))
    connection.execute(f"SET lock_timeout = '{LOCK_TIMEOUT}'")


GRANTS_SQL = """
SELECT COALESCE(string_agg('GRANT ' || privilege_type || ' ON ' || quote_ident(c.relname::text)
                           || ' TO ' || COALESCE(quote_ident(r.rolname::text), 'PUBLIC'),
                           '; '), '')
  FROM pg_class c
 CROSS JOIN aclexplode(c.relacl) AS a
  LEFT JOIN pg_roles r ON r.oid = a.grantee
 WHERE c.oid = to_regclass(%(view)s)::oid
"""


def _replace_view(connection: psycopg.Connection, statement: str, view: str) -> None:
    """Change a view; where its columns have moved it is made anew, with the rights it had."""
    try:
        _insist(connection, statement, view)
    except psycopg.errors.InvalidTableDefinition:
        grants = query(connection, GRANTS_SQL, {"view": view})[0][0]
        _insist(connection, f"DROP VIEW {view}; {statement} {grants}", view)


def _insist(connection: psycopg.Connection, statement: str, table: str) -> None:
    """Run a statement as soon as what it locks is free, and let others pass between the tries."""
    end = time.monotonic() + PATIENCE_SECONDS
    said = False
    while True:
        try:
            connection.execute(statement)
            return
        except psycopg.errors.DuplicateTable as exc:
            raise ValueError(f"{exc}: has a table been renamed that has it? Rename it back and "
                             "call init again") from None
        except (psycopg.errors.LockNotAvailable, psycopg.errors.DeadlockDetected):
            users = _users(connection, table)
            if time.monotonic() > end:
                raise ValueError(f"{table} is still in use by {users}; what was done stays: end "
                                 "that transaction and call init again") from None
        if not said:
            said = True
            say(f"{table} is in use by {users}: trying again each second")
        time.sleep(PAUSE_SECONDS)


# Rows of version 1 that the constraints of version 2 refuse. Who was to wait for ever waits on.
IN_RANGE_SQL = """
UPDATE job_instances
   SET run_after = LEAST(GREATEST(run_after, '1900-01-01 00:00+00'), '3000-01-01 00:00+00')
 WHERE NOT run_after BETWEEN '1900-01-01 00:00+00' AND '3000-01-01 00:00+00'
"""
SHORTER_SQL = """
UPDATE job_types
   SET step_timeout = LEAST(step_timeout, '100 years'),
       retry_delay  = LEAST(retry_delay, '100 years')
 WHERE GREATEST(step_timeout, retry_delay) > '100 years'
"""


def _mend_constraints(connection: psycopg.Connection, wanted: Wanted) -> None:
    """Put the constraints that differ in place: first for new rows, then for what is there."""
    wrong = [one for one in differences(connection, wanted)
             if one.kind == "constraint" and one.wanted.startswith(("CHECK", "FOREIGN KEY"))]
    for one in wrong:
        if one.found != f"{one.wanted} NOT VALID":
            _insist(connection, f"{one.remedy} NOT VALID", one.table)
    for statement, table in (IN_RANGE_SQL, "job_instances"), (SHORTER_SQL, "job_types"):
        if table in {one.table for one in wrong}:
            _insist(connection, statement, table)
    for one in wrong:  # what rows do not fit is told at the end, with how to find them
        with contextlib.suppress(psycopg.IntegrityError):
            _insist(connection, f"ALTER TABLE {one.table} VALIDATE CONSTRAINT {one.part}",
                    one.table)


USERS_SQL = """
SELECT string_agg(pg_catalog.format('session %%s (%%s, %%s, in a transaction since %%s)',
                                    a.pid, a.usename, a.application_name,
                                    date_trunc('second', a.xact_start)), ', ' ORDER BY a.pid)
  FROM pg_stat_activity a
 WHERE a.pid IN (SELECT pid FROM pg_locks WHERE relation = to_regclass(%(table)s)::oid AND granted)
   AND a.pid <> pg_backend_pid()
"""


def _users(connection: psycopg.Connection, table: str) -> str:
    return query(connection, USERS_SQL, {"table": table})[0][0] or "somebody"


def say(text: str) -> None:
    print(f"schema: {text}", file=sys.stderr, flush=True)
