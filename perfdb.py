"""A session in performance_db, and what a time means there.

`connect` gives every session the same settings; `query` runs one statement; `parse_time` reads the
times in job parameters, in the zone of $PERFDB_TIMEZONE.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from datetime import UTC, datetime, tzinfo
from typing import Any

import psycopg
from psycopg.rows import tuple_row
from psycopg.types.json import Jsonb

SCHEMA_VERSION = 1  # job_schema_version() of the schema.sql beside this file

# A vanished host or server is noticed within 30 s: 10 s of silence, then 3 probes 5 s apart.
KEEPALIVES = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3,
              "tcp_user_timeout": 25_000, "connect_timeout": 10}
SERVER_SETTINGS = {"tcp_keepalives_idle": "10", "tcp_keepalives_interval": "5",
                   "tcp_keepalives_count": "3", "tcp_user_timeout": "25000",
                   "client_connection_check_interval": "10s"}


#: JSON Schema of a moment in a job's parameters; see `parse_time`
TIME = {"type": "string", "format": "timestamp",
        "description": "YYYY-MM-DD HH:MM:SS, in the server's zone unless an offset (Z, -03:00) follows"}
TIME_PATTERN = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d(Z|[+-]\d\d:\d\d)?", re.ASCII)


def time_zone() -> tzinfo:
    """Return the zone of times without an offset: $PERFDB_TIMEZONE, or UTC.

    Raise `ValueError` if there is no such zone.
    """
    name = os.environ.get("PERFDB_TIMEZONE") or "UTC"
    if name == "UTC":
        return UTC  # needs no time zone data
    from zoneinfo import ZoneInfo
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        raise ValueError(f"PERFDB_TIMEZONE={name!r} is no time zone this host knows; "
                         "use a name like UTC or Europe/Madrid") from None


def parse_time(text: str) -> datetime:
    """Return the moment, in UTC, that `text` means in its own offset or in `time_zone()`.

    Raise `ValueError` saying why if it is not 'YYYY-MM-DD HH:MM:SS' with an optional UTC offset,
    if there is no such date, or if the clocks of the zone skip that hour; `OverflowError` at the
    ends of the calendar. Of an hour that comes twice the first is taken; write the offset to say which.
    """
    if not TIME_PATTERN.fullmatch(text):
        raise ValueError("write YYYY-MM-DD HH:MM:SS, with an offset like Z or -03:00 if need be")
    moment = datetime.fromisoformat(text)
    if moment.tzinfo is None:
        local, moment = moment, moment.replace(tzinfo=time_zone())
        if moment.astimezone(UTC).astimezone(moment.tzinfo).replace(tzinfo=None) != local:
            raise ValueError(f"the clocks of {moment.tzinfo} skip this hour")
    return moment.astimezone(UTC)


def connect(dsn: str | None = None, application_name: str = "performance server") -> psycopg.Connection:
    """Return an autocommit connection to performance_db, its session in `time_zone()`.

    `dsn` overrides $PERFDB_DSN; with neither, libpq's own PG* variables count. Raise
    `psycopg.OperationalError` if the server cannot be reached or refuses, `ValueError` if the
    connection string or $PERFDB_TIMEZONE makes no sense.
    """
    zone = str(time_zone())
    dsn = dsn or os.environ.get("PERFDB_DSN") or ""
    try:
        given = psycopg.conninfo.conninfo_to_dict(dsn)
    except psycopg.ProgrammingError:  # its text may quote a password
        raise ValueError("--dsn or PERFDB_DSN is no libpq connection string; write it as "
                         "'host=db1 dbname=performance_db user=perf' or "
                         "'postgresql://perf@db1/performance_db'") from None
    defaults = {name: value for name, value in KEEPALIVES.items() if name not in given}
    connection = psycopg.connect(dsn, autocommit=True, **defaults)
    try:
        _set_config(connection, {"TimeZone": zone, "application_name": application_name})
    except psycopg.DataError as exc:
        connection.close()
        raise ValueError(f"PERFDB_TIMEZONE: the server says {exc.diag.message_primary}") from None
    # Servers on systems without these refuse them; they are a help, not a need.
    with contextlib.suppress(psycopg.DataError, psycopg.NotSupportedError):
        _set_config(connection, SERVER_SETTINGS)
    return connection


def query(connection: psycopg.Connection, sql: str, params: Any = None) -> list[tuple[Any, ...]]:
    """Run one statement and return its rows as tuples, whatever rows the connection makes."""
    with connection.cursor(row_factory=tuple_row) as cursor:
        cursor.execute(sql, params)
        return cursor.fetchall() if cursor.description else []


def _set_config(connection: psycopg.Connection, settings: Mapping[str, str]) -> None:
    connection.execute("SELECT set_config(name, value, false) FROM jsonb_each_text(%s) AS s(name, value)",
                       [Jsonb(settings)])


def clean(text: str) -> str:
    """Return `text` as PostgreSQL can store it: no NUL, no half of a surrogate pair."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}").encode("utf-8", "replace").decode()
