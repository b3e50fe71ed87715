"""One request to Bazefield and its answer: TLS, repeats, limits, nothing secret in any text."""

from __future__ import annotations

import base64
import codecs
import functools
import html
import http.client
import io
import json
import random
import re
import select
import socket
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlencode

from bazefield_answer import BazefieldError, as_object, error_inside, redirected_to
from bazefield_settings import Settings, SettingsError
from perfdb import clean

TRIES = 5                         # of a call that may be repeated
BUDGET_SECONDS = 120.0            # no further try after so long
LONGEST_WAIT_SECONDS = 30.0       # between two tries, unless the server asks for longer
BUSY = {408, 429, 502, 503, 504,   # worth another try
        520, 521, 522, 523, 524}   # the same, as Cloudflare says it
MAX_ANSWER_BYTES = 64_000_000
LARGE_BYTES = 8_000_000           # of an answer whose memory is worth a thought
SHOWN_BYTES = 20_000              # of an answer, at most, are looked at for what it says
MAX_QUERY_BYTES = 2_000          # IIS refuses 2,048 and more, with a 404


class LostAnswer(BazefieldError):
    """Nobody knows whether the call was carried out, or will be: read back before asking again."""


# ----------------------------------------------------------------------------------------- secrets


def secret_pattern(key: str) -> re.Pattern[str]:
    """Match a key as it is, percent-encoded, as JSON or HTML escapes, in hex and inside base64."""
    patterns = [_in_any_spelling(key)]
    for raw in (key.encode(), key.encode("utf-16-le")):  # the second is .NET's "Unicode"
        patterns.append(r"[\W_]{0,4}(?:0x)?".join(f"{byte:02x}" for byte in raw))
        for lead in range(3):  # where in a group of three bytes the key begins
            text = base64.b64encode(bytes(lead) + raw).decode()
            inside = text[(lead * 8 + 5) // 6:(lead + len(raw)) * 8 // 6]  # the key alone decides
            if len(inside) > 3:
                patterns += map(_in_base64, {inside,
                                             inside.replace("+", "-").replace("/", "_")})
    return re.compile("|".join(patterns), re.IGNORECASE | re.ASCII)


#: What may split a key: what is no visible ASCII, line ends that are escaped, tags. All that is
#: repeated here and below has a limit, or a text of backslashes would take quadratic time.
GAP = r"(?:[^!-~]|\\{1,8}[nrt]|%(?:25)?(?:0[9ad]|20)|<[^<>]{0,9}>){0,99}"


def _in_any_spelling(text: str) -> str:
    return GAP.join(map(_any_spelling, text))


def _in_base64(text: str) -> str:
    """Match base64: of its characters only + and / are ever escaped."""
    return rf"[\w+/-]{{0,2}}{GAP.join(c if c.isalnum() else _any_spelling(c) for c in text)}" \
           r"[\w+/-]{0,2}"


def _any_spelling(character: str) -> str:
    code, plain = ord(character), re.escape(character)
    named = html.escape(character)
    return (rf"(?:\\{{0,8}}{plain}|%(?:25){{0,8}}{code:02x}|\\{{1,8}}(?:u00|x){code:02x}|"
            rf"&#(?:0{{0,8}}{code}|x0{{0,8}}{code:x});"
            + (f"|{named})" if named != character else ")"))


# ---------------------------------------------------------------------------------------- one call


class TimedSocket:
    """A socket on which a whole exchange must be over by `until`, however small its drips."""

    def __init__(self, connected: socket.socket, until: float) -> None:
        self.socket = connected
        self.until = until  # as time.monotonic() counts

    def left(self) -> float:
        """Return the seconds left; raise `TimeoutError` if there are none."""
        return seconds_left(self.until)

    def sendall(self, data: bytes) -> None:
        self.socket.settimeout(self.left())
        self.socket.sendall(data)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(TimedBytes(self))

    def is_stale(self) -> bool:
        """Whether the server has hung up, or said something unasked such as a 408."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        self.socket.close()


class TimedBytes(io.RawIOBase):
    def __init__(self, timed: TimedSocket) -> None:
        self.timed = timed
        self.raw = timed.socket.makefile("rb", buffering=0)  # keeps it open to the end

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int | None:
        self.timed.socket.settimeout(self.timed.left())
        return self.raw.readinto(buffer)

    def close(self) -> None:
        self.raw.close()
        super().close()


class Response(http.client.HTTPResponse):
    """An answer; interim ones before it (100 Continue, 103 Early Hints) are passed over.

    A chunk of less than nothing is refused: Python would read on to the end of the connection.
    """

    def _read_status(self) -> tuple[str, int, str]:
        while True:
            version, status, reason = super()._read_status()
            if not 100 <= status < 200:
                return version, status, reason
            http.client.parse_headers(self.fp)

    def _read_next_chunk_size(self) -> int:
        if (size := super()._read_next_chunk_size()) < 0:
            raise ValueError("a negative size")
        return size


def seconds_left(until: float) -> float:
    left = until - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def connect(settings: Settings, until: float) -> http.client.HTTPConnection:
    """Return an open connection; raise `OSError` if there is none by `until`."""
    literal = f"[{settings.host}]" if ":" in settings.host else settings.host
    connection = http.client.HTTPConnection(literal, settings.port)
    connection.response_class = Response
    port = settings.port or (443 if settings.scheme == "https" else 80)
    raw = _first_of(socket.getaddrinfo(settings.host, port, type=socket.SOCK_STREAM), until)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if settings.scheme == "https":
        raw.settimeout(seconds_left(until))
        raw = tls_context(settings).wrap_socket(raw, server_hostname=settings.host)
    connection.sock = TimedSocket(raw, until)
    return connection


def tls_context(settings: Settings) -> Any:
    import ssl
    try:
        return ssl.create_default_context(cafile=settings.ca_bundle)
    except OSError as exc:
        raise SettingsError(f"BAZEFIELD_CA_BUNDLE={settings.ca_bundle!r} cannot be used: {exc}; "
                            "write a file of certificates in PEM") from None


def _first_of(addresses: list[Any], until: float) -> socket.socket:
    """Return a connection to the first address that takes it, all within the time left.

    Each has its share of that: one that is silent leaves the others theirs.
    """
    for n, (*_, address) in enumerate(addresses, 1):
        try:
            share = seconds_left(until) / (len(addresses) - n + 1)
            return socket.create_connection(address[:2], share)
        except OSError:
            if n == len(addresses):
                raise
    raise OSError("no address")


def read_body(response: http.client.HTTPResponse) -> bytearray:
    """Return the whole body; raise `TooLong` or, if it was cut short, `IncompleteRead`."""
    content = bytearray()
    if (response.length or 0) <= MAX_ANSWER_BYTES:
        while piece := response.read(65_536):
            content += piece
            if len(content) > MAX_ANSWER_BYTES:
                break
    if max(len(content), response.length or 0) > MAX_ANSWER_BYTES:
        raise TooLong(f"an answer of more than {MAX_ANSWER_BYTES:,} bytes")
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    return content


def decoded(body: bytearray) -> str:
    """Return a body as text; raise `UnicodeDecodeError` if it is no UTF-8.

    Python keeps a text with one character beyond Latin-1 at two or four bytes for each: in a large
    one they are written as JSON escapes.
    """
    if body.startswith(codecs.BOM_UTF8):
        del body[:3]
    if len(body) > LARGE_BYTES and not body.isascii():
        body[:] = re.sub(rb"[\x80-\xff]+", _as_json_escapes, body)
    return body.decode()


def _as_json_escapes(found: re.Match[bytes]) -> bytes:
    return json.dumps(found[0].decode())[1:-1].encode()


class TooLong(Exception):
    """Nobody asked for so much."""


class _Again(Exception):
    """Another try may help."""

    def __init__(self, text: str, unheard: bool = False, retry_after: float = 0) -> None:
        self.text = text
        self.unheard = unheard  # the server has certainly not done it, and will not
        self.retry_after = retry_after


# -------------------------------------------------------------------------------------- the client


class Client:
    """Calls operations over one kept-alive connection; not for several threads at once."""

    sleep = staticmethod(time.sleep)

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._connection: http.client.HTTPConnection | None = None

    def call(self, name: str, *, body: Mapping[str, Any] | None = None,
             query: Mapping[str, str] | None = None, parts: Mapping[str, str] | None = None,
             repeat: bool = True, shrink: Callable[[dict], Any] | None = None) -> Any:
        """Carry out an operation and return its answer, parsed; None if it says nothing (204).

        `parts` fill the {placeholders} of the route; `shrink` is called with each object of the
        answer and what it returns is kept instead. With `repeat` (reads, deletes) busy servers,
        lost connections and timeouts are tried again with growing random waits, at most TRIES
        times within BUDGET_SECONDS; without it only what the server has certainly not heard (no
        connection, a 429), and a lost answer raises `LostAnswer`. Raise `BazefieldError` if the
        server says no, answers nonsense, or does not answer.
        """
        path, content = self._request(name, body, query, parts)
        until = time.monotonic() + BUDGET_SECONDS
        for tries in range(1, TRIES + 1):
            try:
                return self._once(name, path, content, repeat, shrink)
            except _Again as again:
                may = repeat or again.unheard
                wait = max(again.retry_after,
                           random.uniform(0, min(LONGEST_WAIT_SECONDS, 0.25 * 2 ** tries)))
                if not may or tries == TRIES or time.monotonic() + wait > until:
                    text = again.text + (f", {tries} tries" if may and tries > 1 else "")
                    if again.retry_after:
                        text += f"; it asks for {again.retry_after:,.0f} s until the next"
                    raise self.error(name, text, BazefieldError if may else LostAnswer) from None
            self.sleep(wait)
        raise AssertionError("unreachable")

    def close(self) -> None:
        if self._connection:
            self._connection.close()
            self._connection = None

    @functools.cached_property
    def _secret(self) -> re.Pattern[str]:
        return secret_pattern(self.settings.key)

    def hide(self, text: str) -> str:
        """Return `text`, at most SHOWN_BYTES of it, without the key, however it is spelled."""
        shown = self._secret.sub("***", text[:SHOWN_BYTES])
        return shown if len(text) <= SHOWN_BYTES else self._cut(shown)

    def _cut(self, text: str) -> str:
        """Return `text` without its end, where half a key may stand."""
        return text[:max(0, len(text) - 12 * len(self.settings.key))]

    def clean(self, text: str) -> str:
        """Return `text` on one line, 400 characters at most, without key or control character."""
        return " ".join(clean(self.hide(text)).split())[:400]

    def error(self, name: str, text: str,
              kind: type[BazefieldError] = BazefieldError) -> BazefieldError:
        return kind(self.clean(f"{name}: {text}"))

    def _request(self, name: str, body: Any, query: Any, parts: Any) -> tuple[str, bytes | None]:
        """Return the path with its query, and the body to send."""
        operation = self.settings.operations[name]
        if missing := [key for key in operation.required if (body or {}).get(
                operation.fields.get(key, key)) in (None, "", [], ())]:
            raise ValueError(f"{name} must never go out without {', '.join(missing)}; "
                             "nothing was sent")
        path = self.settings.path + operation.route.format_map(
            {key: quote(value, safe="") for key, value in (parts or {}).items()})
        asked = urlencode({**(query or {}), "format": "json"})
        if len(asked) > MAX_QUERY_BYTES or len(path) > MAX_QUERY_BYTES:
            raise self.error(name, f"more than {MAX_QUERY_BYTES:,} bytes in a URL; not sent")
        path += ("&" if "?" in path else "?") + asked  # a changed route may bring some of its own
        return path, None if body is None else json.dumps(body).encode()

    def _once(self, name: str, path: str, content: bytes | None, repeat: bool, shrink: Any) -> Any:
        """Send one request; raise `_Again` for whatever another try may cure."""
        try:
            verb = self.settings.operations[name].verb
            response, body = self._exchange(verb, path, content, repeat)
        except TooLong as exc:
            self.close()
            raise self.error(name, str(exc), BazefieldError if repeat else LostAnswer) from None
        except BaseException as exc:  # half an answer must not be read by the next call
            unheard = self._connection is None
            self.close()
            if isinstance(exc, SettingsError) or not isinstance(exc, Exception):
                raise  # or the step's time is over
            if type(exc).__name__ == "SSLCertVerificationError":
                hint = TLS_HINTS.get(exc.verify_code, "name its authority in BAZEFIELD_CA_BUNDLE")
                raise self.error(name, "the server's certificate is not trusted: "
                                 f"{exc.verify_message}; {hint}") from None
            raise _Again(f"no answer from {self.settings.host}: {self._why(exc)}",
                         unheard) from None
        if response.will_close:
            self.close()
        self._check_status(name, response, body)
        # What is no answer leaves open what was done, and what is still to come.
        return self._parsed(name, response, body, shrink, BazefieldError if repeat else LostAnswer)

    def _exchange(self, verb: str, path: str, content: bytes | None,
                  repeat: bool) -> tuple[http.client.HTTPResponse, bytearray]:
        """Send a request and return the answer with its body, all of it within the time limit."""
        until = time.monotonic() + self.settings.timeout
        # On a kept connection nobody can tell a server that has hung up while idle from one that
        # took the request and died: what must not be sent twice goes over a new one.
        if self._connection and (not repeat or self._connection.sock.is_stale()):
            self.close()
        if kept := self._connection is not None:
            self._connection.sock.until = until
        else:
            self._connection = connect(self.settings, until)
        try:
            self._connection.request(verb, path, content, self._headers(content))
            response = self._connection.getresponse()
        except ConnectionError:
            if not kept:
                raise
            self.close()  # ended at this very moment: no reason to wait before the next try
            return self._exchange(verb, path, content, repeat)
        return response, read_body(response)

    def _headers(self, content: bytes | None) -> dict[str, str]:
        headers = {"Authorization": f"Bearer {self.settings.key}", "Accept": "application/json"}
        return headers | ({} if content is None else {"Content-Type": "application/json"})

    def _why(self, exc: Exception) -> str:
        if isinstance(exc, TimeoutError):
            return f"not complete within {self.settings.timeout:g} s (BAZEFIELD_TIMEOUT)"
        if isinstance(exc, http.client.IncompleteRead):
            return "it was cut short"
        return f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__

    def _check_status(self, name: str, response: http.client.HTTPResponse,
                      body: bytearray) -> None:
        """Raise what an answer that is no success means."""
        status = response.status
        if status in BUSY:
            raise _Again(f"status {status}: {self._said(body)}", status == 429,
                         retry_after(response))
        if 300 <= status < 400 and response.getheader("Location"):
            there = redirected_to(response.getheader("Location"), self.settings.host)
            raise self.error(name, f"redirected to {there!r}, which is not followed; check "
                             "BAZEFIELD_URL and the API key")
        if not 200 <= status < 300:
            raise self.error(name, f"status {status}: {self._said(body)}{HINTS.get(status, '')}")

    def _parsed(self, name: str, response: http.client.HTTPResponse, body: bytearray,
                shrink: Any, nonsense: type[BazefieldError]) -> Any:
        """Return what a success holds, None if nothing; raise if that is an error or no JSON."""
        coding = response.getheader("Content-Encoding", "identity")
        if coding.strip().lower() not in ("", "identity"):
            raise self.error(name, f"status {response.status}, but the answer is compressed "
                             f"({coding}), which was not asked for; what on the way does that?",
                             nonsense)
        if not body:
            return None
        try:
            text = decoded(body)
            del body[SHOWN_BYTES:]  # or a large answer would take its memory twice
            value = json.loads(text, object_pairs_hook=lambda pairs: as_object(pairs, shrink))
        except BazefieldError as exc:
            raise self.error(name, f"status {response.status}, but {exc}", nonsense) from None
        except RecursionError:
            raise self.error(name, "an answer that is nested too deep", nonsense) from None
        except ValueError:
            said = self._said(body)
            if response.getheader("Content-Length") is None and not response.chunked:
                raise _Again(f"no whole answer: {said}") from None  # cut short, for all we know
            raise self.error(name, f"status {response.status}, but no JSON: {said}",
                             nonsense) from None
        if text := error_inside(value):
            raise self.error(name, f"status {response.status}, but {text}")
        return value

    def _said(self, body: bytearray) -> str:
        """Return what an answer says that is no success: its message, or its first line.

        The key is taken out before anything is cut off, or half of it might be left.
        """
        text = self.hide(body[:SHOWN_BYTES].decode("utf-8", "replace"))
        if len(body) >= SHOWN_BYTES:
            text = self._cut(text)
        try:
            if said := error_inside(json.loads(text)):
                return said
        except (ValueError, RecursionError):
            pass
        lines = (line.strip() for line in re.sub("<[^>]*>", " ", text).splitlines())
        return next((line for line in lines if line), "(empty answer)")


HINTS = {401: "; check the API key",
         403: "; the key's user lacks the right (write access to the tag's data is separate from "
              "access to the object)"}
HINTS[404] = HINTS[405] = "; check BAZEFIELD_URL and the route (python bazefield.py --check)"

#: by X509_V_ERR_...: not yet valid, expired, host name, IP address
TLS_HINTS = dict.fromkeys((9, 10), "have it renewed, or look at the clock of this machine")
TLS_HINTS |= dict.fromkeys((62, 64), "write the host to BAZEFIELD_URL as the certificate names it")


def retry_after(response: http.client.HTTPResponse) -> float:
    """Return the seconds the server asks us to wait, as a number or a date; 0 if it does not."""
    text = response.getheader("Retry-After", "")
    if text.isdecimal():
        return float(text)
    from email.utils import parsedate_to_datetime
    try:
        return max(0.0, (parsedate_to_datetime(text) - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError, IndexError, OverflowError):
        return 0.0
