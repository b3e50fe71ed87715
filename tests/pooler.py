"""Poolers between a test and its server: PgBouncer where it is installed, and a stand-in for it.

    with Pooler(dsn, shared=True) as pooler:
        perfdb.connect(pooler.dsn)

Clients log in at a port of ours. Shared, as with pool_mode = transaction: the statements of all
clients go over one server session, in turn. Not shared, as with pool_mode = session: each has its
own. In both a client is told another process id than the server's, as by any pooler.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import wait_for
from psycopg.conninfo import conninfo_to_dict, make_conninfo

SSL_REQUEST, GSS_REQUEST = 80877103, 80877104


class Pooler:
    def __init__(self, dsn: str, shared: bool) -> None:
        self.path = "{host}/.s.PGSQL.{port}".format(**conninfo_to_dict(dsn))
        self.shared = shared
        self.turn = threading.Lock()
        self.server: socket.socket | None = None
        self.greeting = b""
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.dsn = make_conninfo(dsn, host="127.0.0.1", port=self.listener.getsockname()[1],
                                 sslmode="disable", gssencmode="disable")

    def __enter__(self) -> Pooler:
        threading.Thread(target=self.accept, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()
        if self.server:
            self.server.close()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self.serve, args=[client], daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        """Log a client in, then pass its messages on, a round up to ReadyForQuery at a time."""
        with client, contextlib.suppress(OSError):
            startup = read(client, has_type=False)
            with self.turn:
                server = self.server if self.shared and self.server else self.log_in(startup)
            client.sendall(self.greeting)
            while (message := read(client))[:1] != b"X":
                with self.turn if self.shared else contextlib.nullcontext():
                    server.sendall(message)
                    while message[:1] not in b"QS":  # a round ends with Query or Sync
                        server.sendall(message := read(client))
                    while (answer := read(server))[:1] != b"Z":
                        client.sendall(answer)
                    client.sendall(answer)

    def log_in(self, startup: bytes) -> socket.socket:
        """Open a server session; keep its greeting for clients, but for the process id."""
        server = socket.socket(socket.AF_UNIX)
        server.connect(self.path)
        server.sendall(startup)
        self.greeting, message = b"", b""
        while message[:1] != b"Z":
            message = read(server)
            if message[:1] == b"K":
                message = message[:5] + struct.pack("!i", -4711) + message[9:]
            self.greeting += message
        self.server = server
        return server


def read(peer: socket.socket, has_type: bool = True) -> bytes:
    """Return the next message; raise `OSError` if the peer has gone."""
    head = read_bytes(peer, 5 if has_type else 4)
    return head + read_bytes(peer, struct.unpack("!i", head[-4:])[0] - 4)


def read_bytes(peer: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        if not (more := peer.recv(count - len(data))):
            raise ConnectionResetError
        data += more
    return data


PGBOUNCER_INI = """
[databases]
* = host={host} port={port}
[pgbouncer]
listen_addr =
unix_socket_dir = {directory}
listen_port = 6432
auth_type = trust
auth_file = {directory}/users
logfile = {directory}/log
{settings}
"""


def answers(path: Path) -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        return True
    return False


@contextlib.contextmanager
def pgbouncer(dsn: str, settings: str) -> Iterator[str]:
    """Start a real PgBouncer before the server of `dsn` and yield a connection string to it."""
    program = shutil.which("pgbouncer", path=f"/usr/sbin:{os.environ['PATH']}")
    server = conninfo_to_dict(dsn)
    if program is None or not server["host"].startswith("/"):
        pytest.skip("needs PgBouncer (apt-get install pgbouncer) and the server's Unix socket")
    directory = Path(tempfile.mkdtemp(prefix="perfdb-pgb-"))
    (directory / "ini").write_text(
        PGBOUNCER_INI.format(**server, directory=directory, settings=settings))
    (directory / "users").write_text(f'"{server["user"]}" ""\n')
    who = {}
    if os.geteuid() == 0:  # which it refuses to run as
        who = {"user": "nobody", "extra_groups": []}
        for path in (directory, *directory.iterdir()):
            shutil.chown(path, "nobody")
    process = subprocess.Popen([program, "-q", directory / "ini"], stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL, **who)
    try:
        wait_for(lambda: answers(directory / ".s.PGSQL.6432"), what="PgBouncer")
        yield make_conninfo(dsn, host=directory, port=6432)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(directory)
