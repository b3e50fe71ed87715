"""A hot standby: a copy of an embedded PostgreSQL that follows it until it is cut off."""

from __future__ import annotations

import os

import psycopg
from embedded_pg import Server, ServerError
from helpers import wait_for


class Standby(Server):
    """A running standby of `primary`, which must outlive it; as a `Server` otherwise."""

    def __init__(self, primary: Server) -> None:
        super().__init__(primary.settings)
        self.primary = primary

    def _prepare(self) -> None:
        """Copy the primary's files instead of making new ones."""
        self.bin = self.primary.bin
        if self.user is not None:
            os.chown(self.directory, self.user.pw_uid, self.user.pw_gid)
        copy = self._spawn(
            "pg_basebackup", "-D", self.directory / "data", "-d", self.primary.dsn(),
            "--checkpoint=fast", "--write-recovery-conf", "--no-sync")
        if copy.wait() != 0:
            raise ServerError(f"pg_basebackup ended with status {copy.returncode}:\n{self._log()}")

    def cut_off(self) -> None:
        """Stop following: what the primary commits from now on is not heard of here."""
        with psycopg.connect(self.dsn(), autocommit=True) as conn:
            conn.execute("ALTER SYSTEM SET primary_conninfo = ''")
            conn.execute("SELECT pg_reload_conf()")
            wait_for(lambda: not conn.execute("SELECT 1 FROM pg_stat_wal_receiver").fetchall(),
                     what="the standby to stop following")

    def promote(self) -> None:
        """Become a primary."""
        with psycopg.connect(self.dsn(), autocommit=True) as conn:
            if conn.execute("SELECT pg_promote()").fetchone() != (True,):
                raise ServerError(f"the standby was not promoted:\n{self._log()}")
