"""What tests share that is not a fixture."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import pytest

import claims

T = TypeVar("T")


def wait_for(condition: Callable[[], T], timeout: float = 20, what: str = "") -> T:
    """Call `condition` until it returns something true, and return that.

    Raise `AssertionError` after `timeout` seconds, naming `what` was waited for.
    """
    deadline = time.monotonic() + timeout
    while not (result := condition()):
        if time.monotonic() > deadline:
            what = what or getattr(condition, "__qualname__", repr(condition))
            raise AssertionError(f"waited {timeout} s for {what}; the last answer was {result!r}")
        time.sleep(0.01)
    return result


def flush_statistics(connection) -> None:
    """Have the server count now what this session has done; skip the test where it cannot."""
    if connection.info.server_version < 150000:
        pytest.skip("counts come half a second late, or never, before PostgreSQL 15")
    connection.execute("SELECT pg_stat_force_next_flush()")


def claim(worker, *types: str) -> claims.Job | None:
    """Have `worker` claim the most urgent due job of these types, as a handler does."""
    return claims.claim(worker, claims.Wanted.of(types))
