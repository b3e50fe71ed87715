"""A session in performance_db, and what a time means there.

`connect` gives every session the same settings, whatever its database or role says; `refuse_unfit`
finds the databases the toolkit cannot work in; `is_passing` tells errors that say nothing about a
job; `query` runs one statement; `parse_time` reads the times in job parameters.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import select
from datetime import UTC, datetime, tzinfo
from typing import Any

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict
from psycopg.rows import dict_row, tuple_row
from psycopg.types.json import Jsonb, set_json_loads

SCHEMA_VERSION = 2  # job_schema_version() of the schema.sql beside this file

# A vanished server is noticed within 30 s: 10 s of silence, then 3 probes 5 s apart.
KEEPALIVES = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3,
              "tcp_user_timeout": 25_000, "connect_timeout": 10}

#: What every session is set to, whatever its database or role has been given; search_path and
#: default_transaction_read_only are the site's.
SESSION_SETTINGS = {
    "default_transaction_isolation": "read committed",  # claims and fences want the latest rows
    "DateStyle": "ISO,YMD",           # psycopg reads no other
    "IntervalStyle": "postgres",      # nor this
    "extra_float_digits": "1",        # or floats come rounded
    "standard_conforming_strings": "on",
    # A worker is idle while a step works elsewhere, and the step may hold a transaction open.
    # Steps have a limit of their own (job_types.step_timeout).
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_session_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
    "transaction_timeout": "0",       # PostgreSQL 17
    "quote_all_identifiers": "off",   # the schema is compared as PostgreSQL writes it
    "jit": "off",                     # compiling takes 100 times as long as our statements run
}
NOT_EVERYWHERE = {"transaction_timeout"}  # would be refused in the startup packet before 17

# A vanished host is noticed within 30 s, and with it that its worker is dead. Servers on systems
# that lack these refuse them; they are a help, not a need.
SERVER_KEEPALIVES = {
    "tcp_keepalives_idle": "10", "tcp_keepalives_interval": "5", "tcp_keepalives_count": "3",
    "tcp_user_timeout": "25000", "client_connection_check_interval": "10s"}

#: JSON Schema of a moment in a job's parameters; see `parse_time`
TIME = {"type": "string", "format": "timestamp",
        "description": "YYYY-MM-DD HH:MM:SS or ISO 8601 (YYYY-MM-DDTHH:MM:SS), in the server's "
                       "zone unless an offset (Z, -03:00, -0300) follows"}
# Whole seconds: windows are. JavaScript writes .000 all the same.
TIME_PATTERN = re.compile(
    r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d(\.0+)?(Z|[+-]\d\d:?\d\d)?", re.ASCII)


class UnfitDatabase(Exception):
    """The toolkit cannot work in this database as it is reached; the text says what to do."""


class BadSetting(ValueError):
    """A connection string or a zone that makes no sense; the text quotes no password."""


READ_ONLY = (
    "default_transaction_read_only is on for this database or role, so that nothing can be "
    "written: ALTER DATABASE ... (or ROLE ...) SET default_transaction_read_only = off")
GONE_BY = (": a trigger or rule of the site lets an INSERT into {table} go by without a word; "
           "take it off, or have it raise an error that says why")


def time_zone() -> tzinfo:
    """Return the zone of times without an offset: $PERFDB_TIMEZONE, or UTC.

    Raise `BadSetting` if there is no such zone.
    """
    name = os.environ.get("PERFDB_TIMEZONE") or "UTC"
    if name == "UTC":
        return UTC  # needs no time zone data
    from zoneinfo import ZoneInfo
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise BadSetting(f"PERFDB_TIMEZONE={name!r} is no time zone this host knows; "
                         "use a name like UTC or Europe/Madrid") from None


def parse_time(text: str) -> datetime:
    """Return the moment, in UTC, that `text` means in its own offset or in `time_zone()`.

    Raise `ValueError` saying why if it is not 'YYYY-MM-DD HH:MM:SS' (or with a T between, as in
    ISO 8601) with an optional UTC offset, if there is no such date, or if the clocks of the zone
    skip that hour; `OverflowError` at the ends of the calendar. Of an hour that comes twice the
    first is taken; write the offset to say which.
    """
    if not (match := TIME_PATTERN.fullmatch(text)):
        raise ValueError("write YYYY-MM-DD HH:MM:SS or YYYY-MM-DDTHH:MM:SS, in whole seconds, "
                         "with an offset like Z, -03:00 or -0300 if need be")
    moment = datetime.fromisoformat(text.replace(match[1] or "\0", ""))
    if moment.tzinfo is None:
        local, moment = moment, moment.replace(tzinfo=time_zone())
        if moment.astimezone(UTC).astimezone(moment.tzinfo).replace(tzinfo=None) != local:
            raise ValueError(f"the clocks of {moment.tzinfo} skip this hour")
    return moment.astimezone(UTC)


# -------------------------------------------------------------------------------------- connecting


# A host with an @ inside (at its begin: an abstract socket; behind a /: a directory), a port that
# is no number: pieces of a password in a URI, which the server's or libpq's answer would show.
TORN_HOST, TORN_PORT = re.compile(r"(^|,)[^@/,][^,]*@"), re.compile(r"[^\d,\s]")


def connect(dsn: str | None = None,
            application_name: str = "performance server") -> psycopg.Connection:
    """Return an autocommit connection to performance_db, its session in `time_zone()`.

    The session has `SESSION_SETTINGS`, and RESET ALL returns to them (if the way to the server
    allows it; see `settlement`). `dsn` overrides $PERFDB_DSN; with neither, libpq's own PG*
    variables count. JSON that Python cannot load comes as its text.

    Raise `psycopg.OperationalError` if the server cannot be reached or refuses, `BadSetting` if
    the connection string or $PERFDB_TIMEZONE makes no sense.
    """
    zone = str(time_zone())
    dsn = dsn or os.environ.get("PERFDB_DSN") or ""
    try:
        given = conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:  # its text may quote a password
        raise BadSetting("--dsn or PERFDB_DSN is no libpq connection string; write it as "
                         "'host=db1 dbname=performance_db user=perf' or "
                         "'postgresql://perf@db1/performance_db'") from None
    if TORN_HOST.search(given.get("host", "")) or TORN_PORT.search(str(given.get("port", ""))):
        raise BadSetting("--dsn or PERFDB_DSN: a part of the password seems to stand where the "
                         "host or the port should; in a URI write %40 for @, %2F for /, %3A for "
                         ": and %25 for % in a password")
    wanted = {name: value for name, value in KEEPALIVES.items() if name not in given}
    wanted |= {"application_name": application_name, "client_encoding": "UTF8"}
    connection = _open(dsn, given, wanted, zone)
    set_json_loads(load_json, connection)
    try:
        _settle(connection, zone)
    except psycopg.DataError as exc:
        connection.close()
        raise BadSetting(f"PERFDB_TIMEZONE: the server says {exc.diag.message_primary}") from None
    return connection


# A refused startup packet: names of settings are the same in all languages.
STARTUP_PATTERN = re.compile(
    rf"\b(options|TimeZone|{'|'.join(SESSION_SETTINGS | SERVER_KEEPALIVES)})\b")
SPACE = "\\ "  # in libpq's options


def _open(dsn: str, given: dict[str, Any], wanted: dict[str, Any],
          zone: str) -> psycopg.Connection:
    """Connect, with the settings in the startup packet if they can be had there.

    There they are what RESET ALL returns to. Poolers refuse some, and a service file may hold
    options that ours would replace: there `_settle` sets them afterwards.
    """
    if "service" in given and "options" not in given:
        return psycopg.connect(dsn, autocommit=True, **wanted)
    try:
        return psycopg.connect(dsn, autocommit=True, **wanted, options=_options(given, zone))
    except psycopg.OperationalError as exc:
        if not STARTUP_PATTERN.search(str(exc)):
            raise
    return psycopg.connect(dsn, autocommit=True, **wanted)


def _options(given: dict[str, Any], zone: str) -> str:
    """Return libpq's `options`: the user's own, and after them ours."""
    defaults = {option.keyword: option.val for option in pq.Conninfo.get_defaults()}
    own = given.get("options") or (defaults[b"options"] or b"").decode()
    ours = SESSION_SETTINGS | SERVER_KEEPALIVES | {"TimeZone": zone, "perfdb.settled": "on"}
    return " ".join([own, *(f"-c {name}={value.replace(' ', SPACE)}"
                            for name, value in ours.items() if name not in NOT_EVERYWHERE)])


# perfdb.settled is there if the startup packet has reached the server; off, set below, says that
# RESET ALL takes back what could not be in it. Apart from the statement below and small, because a
# session's first statement is the dear one.
SETTLED_SQL = """
SELECT current_setting('perfdb.settled', true) IS NOT NULL,
       current_setting('transaction_timeout', true) <> '0'
"""

SETTLE_SQL = """
SELECT set_config(wanted.name, wanted.value, false)
  FROM jsonb_each_text(%s::jsonb) AS wanted(name, value)
 WHERE current_setting(wanted.name, true) <> wanted.value
"""


def _settle(connection: psycopg.Connection, zone: str) -> None:
    """Set what the startup packet did not bring."""
    is_settled, can_time_out = query(connection, SETTLED_SQL)[0]
    if not is_settled or can_time_out:
        connection.execute(*settlement())
    if not is_settled:
        with contextlib.suppress(psycopg.DataError, psycopg.NotSupportedError):
            connection.execute(SETTLE_SQL, [Jsonb(SERVER_KEEPALIVES)])


def connect_plainly(dsn: str | None = None) -> psycopg.Connection:
    """Return a session as the database and the role make it, for questions about them."""
    return psycopg.connect(dsn or os.environ.get("PERFDB_DSN") or "", autocommit=True)


def settlement() -> tuple[str, list[Any]]:
    """Return the statement, and its parameters, that sets again what RESET ALL has taken back.

    Needed only where perfdb.settled is not on: where the startup packet did not reach the server
    or the database has a transaction_timeout.
    """
    return SETTLE_SQL, [Jsonb({"TimeZone": str(time_zone()), "perfdb.settled": "off"}
                              | SESSION_SETTINGS)]


def load_json(text: str | bytes) -> Any:
    """Return the value of a JSON text, or the text where Python cannot load it.

    One row with a number of 5,000 digits, or nested 1,500 deep, must not hide all others.
    """
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text if isinstance(text, str) else bytes(text).decode()


def query(connection: psycopg.Connection, sql: str, params: Any = None) -> list[tuple[Any, ...]]:
    """Run one statement and return its rows as tuples, whatever rows the connection makes."""
    with connection.cursor(row_factory=tuple_row) as cursor:
        cursor.execute(sql, params)
        return cursor.fetchall() if cursor.description else []


def rows_of(connection: psycopg.Connection, sql: str, params: Any = None) -> list[dict[str, Any]]:
    """Run one statement and return its rows as dicts, whatever rows the connection makes."""
    with connection.cursor(row_factory=dict_row) as cursor:
        return cursor.execute(sql, params).fetchall()


# ------------------------------------------------------------------------------- what can go wrong


# Classes of SQLSTATE, or whole ones: 08 connection, 40 rolled back (serialization, deadlock),
# 53 no space, memory or connections left, 57 cancelled or shutting down, 58 the server's files;
# 25006 read only or a standby; 25P03, 25P04 ended by a timeout; 55P03 a lock not had.
PASSING = ("08", "40", "53", "57", "58", "25006", "25P03", "25P04", "55P03")


def is_passing(exc: BaseException) -> bool:
    """Whether an error says nothing about the job at hand, so that it is worth another try."""
    if not isinstance(exc, psycopg.Error):
        return False
    if exc.sqlstate:
        return exc.sqlstate.startswith(PASSING)
    return isinstance(exc, psycopg.OperationalError)  # the connection broke, or was closed


def explain(exc: psycopg.Error) -> str:
    """Return what the server says in one line, and what to do where that is known."""
    remedy = ""
    if isinstance(exc, psycopg.errors.InsufficientPrivilege):
        remedy = ": OPERATIONS.md, Roles, has the GRANTs"
    if isinstance(exc, psycopg.errors.UndefinedTable | psycopg.errors.UndefinedColumn
                  | psycopg.errors.UndefinedFunction):
        remedy = ": run `python jobctl.py init`"
    return f"{exc.diag.message_primary or str(exc).strip()}{remedy}"


FITNESS_SQL = """
SELECT pg_backend_pid(), pg_is_in_recovery(), getdatabaseencoding(),
       current_setting('default_transaction_read_only')::boolean,
       row_security_active(to_regclass('job_instances')::oid)
       OR row_security_active(to_regclass('job_steps')::oid)
       OR row_security_active(to_regclass('job_types')::oid)
"""

# Tables all of whose rows are hidden: from the current role, or only from others than the owner.
HIDDEN_SQL = """
SELECT c.relname::text, row_security_active(c.oid)
  FROM pg_class c
 WHERE c.relrowsecurity
   AND c.relkind = 'r'
   AND pg_table_is_visible(c.oid)
   AND c.relnamespace = (SELECT relnamespace FROM pg_class
                          WHERE oid = to_regclass('job_types')::oid)
   AND NOT EXISTS (SELECT FROM pg_policy WHERE polrelid = c.oid)
 ORDER BY c.relname
"""


def refuse_unfit(connection: psycopg.Connection, dsn: str | None = None) -> None:
    """Raise `UnfitDatabase` where no handler can work: SQL_ASCII, a standby, read only, shared
    sessions, rows that are hidden from it.

    One statement; only if there is a pooler in between, whose own number of the session is not the
    server's, a second connection to `dsn`, by which `connection` was made.
    """
    pid, in_recovery, encoding, read_only, some_rows = query(connection, FITNESS_SQL)[0]
    if in_recovery:
        raise UnfitDatabase(
            "this server is a hot standby and cannot be written to: connect to the primary; with "
            "both hosts in PERFDB_DSN and target_session_attrs=read-write libpq finds it")
    if read_only:
        raise UnfitDatabase(READ_ONLY)
    if encoding == "SQL_ASCII":
        raise UnfitDatabase(
            "the database's encoding is SQL_ASCII, which stores any bytes and tells nobody what "
            "they mean: make one with CREATE DATABASE ... ENCODING 'UTF8' TEMPLATE template0 and "
            "restore a dump of this one there (pg_dump -E names its true encoding)")
    hidden = query(connection, HIDDEN_SQL) if some_rows else []
    if tables := ", ".join(table for table, is_ours in hidden if is_ours):
        raise UnfitDatabase(
            f"row security is on for {tables} without a policy, so that this role finds no row "
            "there and no job would ever run: see jobctl doctor")
    if pid == connection.info.backend_pid:
        return
    with contextlib.closing(connect_plainly(dsn)) as other:
        if sessions_are_shared(connection, other):
            raise UnfitDatabase(SHARED)



SHARED = (
    "sessions are shared by a pooler (PgBouncer with pool_mode = transaction or statement?), so "
    "the workers' locks mean nothing: connect to PostgreSQL directly, or give PgBouncer's entry "
    "for this database pool_mode = session")
PROBES = 5           # turns that the two sessions take
PROBE_SECONDS = 2.0  # a pooler that lets us wait for a second session gave us a whole one


def sessions_are_shared(connection: psycopg.Connection, other: psycopg.Connection) -> bool:
    """Whether a pooler gives the two the same server session in turn; close `other` then.

    A session of our own keeps its process, and nobody else ever sees that process.
    """
    mine = {_backend(connection)}
    for _ in range(PROBES):
        if (theirs := _backend(other)) is None:
            return False
        mine.add(_backend(connection))
        if theirs in mine or len(mine) > 1:
            return True
    return False


def _backend(connection: psycopg.Connection) -> int | None:
    """Return the server process that runs our next statement; None if none does so in time."""
    pgconn = connection.pgconn
    pgconn.send_query(b"SELECT pg_catalog.pg_backend_pid()")
    pids = []
    while True:
        while pgconn.is_busy():
            if not select.select([pgconn.socket], [], [], PROBE_SECONDS)[0]:
                return None
            pgconn.consume_input()
        if (result := pgconn.get_result()) is None:
            return pids[0] if pids else None
        if result.status == pq.ExecStatus.TUPLES_OK:
            pids.append(int(result.get_value(0, 0)))


# What moves a terminal or turns its text around: C0 but newline and tab, DEL, C1, line separators
# and marks of writing direction.
CONTROL = re.compile("[\x01-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def clean(text: str, connection: psycopg.Connection | None = None) -> str:
    """Return `text` as PostgreSQL can store and any terminal can show it.

    Control characters become visible text such as \\x1b, newline and tab stay; NUL and halves of a
    surrogate pair are replaced. With `connection`, also nothing is left that its database's
    encoding lacks: a euro sign in a LATIN1 database becomes a question mark.
    """
    text = text.replace("\r\n", "\n").replace("\0", "\N{REPLACEMENT CHARACTER}")
    text = CONTROL.sub(_visible, text).encode("utf-8", "replace").decode()
    encoding = (connection and connection.info.parameter_status("server_encoding")) or "UTF8"
    codec = encoding.replace("WIN", "cp").replace("KOI8", "koi8_")  # others as they are
    try:
        return text.encode(codec, "replace").decode(codec)
    except LookupError:
        return text.encode("ascii", "replace").decode()


def _visible(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"


class LogFormatter(logging.Formatter):
    """Log lines in which control characters show as text, wherever they come from."""

    def format(self, record: logging.LogRecord) -> str:
        return clean(super().format(record))
