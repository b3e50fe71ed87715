"""TCP on loopback in front of a server; can go deaf or silent without closing anything."""

from __future__ import annotations

import contextlib
import socket
import threading

from psycopg.conninfo import conninfo_to_dict, make_conninfo


class Proxy:
    """Who connects to its `dsn` reaches the given one; silent once a client sends `silent_at`."""

    def __init__(self, dsn: str, silent_at: bytes = b"") -> None:
        self.server = conninfo_to_dict(dsn)
        self.silent_at = silent_at
        self.silent = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.dsn = make_conninfo(dsn, host="127.0.0.1", port=self.listener.getsockname()[1],
                                 sslmode="disable", gssencmode="disable")  # to be read here
        self.near: list[socket.socket] = []
        self.far: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, far = self.listener.accept()[0], self._dial()
                self.near.append(near)
                self.far.append(far)
                for ends in ((near, far), (far, near)):
                    threading.Thread(target=self._forward, args=ends, daemon=True).start()

    def _dial(self) -> socket.socket:
        host, port = self.server["host"], self.server["port"]
        if not host.startswith("/"):
            return socket.create_connection((host, int(port)))
        far = socket.socket(socket.AF_UNIX)
        far.connect(f"{host}/.s.PGSQL.{port}")
        return far

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                if self.silent_at and self.silent_at in data and source in self.near:
                    self.silent.set()
                if not self.silent.is_set():
                    sink.sendall(data)

    def go_silent(self) -> None:
        """Take everything from both sides from now on, and pass nothing on."""
        self.silent.set()

    def go_deaf(self) -> None:
        """Let the server see its clients vanish, and the clients see nothing."""
        for far in self.far:
            with contextlib.suppress(OSError):
                far.shutdown(socket.SHUT_RDWR)

    def heal(self) -> None:
        """Close what there is on both sides, and forward what comes after that."""
        self.silent_at = b""
        self.silent.clear()
        for end in self.near + self.far:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)  # wakes whoever waits in recv, as close does not
            end.close()

    def close(self) -> None:
        """Refuse connections from now on, and end those there are."""
        self.listener.close()
        self.heal()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
