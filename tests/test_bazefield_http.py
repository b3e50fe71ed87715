"""One request to Bazefield: settings, TLS, limits, and nothing secret in any text."""

import json
import logging
import socket
import subprocess
import time
import traceback
from dataclasses import replace

import pytest
from bazefield_fixtures import LAN_01, T0, WANTED
from fake_bazefield import FakeBazefield
from fake_bazefield_http import FAULTS, SPELLINGS
from helpers import wait_for

import bazefield
import bazefield_http
import perfdb
import tables


@pytest.mark.parametrize(("env", "problem"), [
    ({}, "BAZEFIELD_URL=''"),
    ({"BAZEFIELD_URL": "http://scada.example"}, "plain http is taken for localhost only"),
    ({"BAZEFIELD_URL": "https://u:p4ss@scada.example"}, "must not hold a user or password"),
    ({"BAZEFIELD_URL": "https://scada.example:x"}, "write https://HOST"),
    ({"BAZEFIELD_URL": "https://u:p4ss@scada.example:x"}, "must not hold a user or password"),
    ({"BAZEFIELD_URL": "https://u:p4/ss@scada.example"}, "must not hold a user or password"),
    ({"BAZEFIELD_URL": "u:p4ss@scada.example"}, "must not hold a user or password"),
    ({"BAZEFIELD_URL": "p4ss"}, "BAZEFIELD_URL (not shown; it has no ://): write https://HOST"),
    ({"BAZEFIELD_URL": "https://scada.example/Baze Field"}, "fragment or blank"),
    ({"BAZEFIELD_URL": "https://scada .example"}, "fragment or blank"),
    ({"BAZEFIELD_URL": "https://scada.example/B\u00e4ze"}, "fragment or blank"),
    ({"BAZEFIELD_URL": "https://scada.example/?apikey=p4ss"}, "BAZEFIELD_URL='https://scada.exam"),
    ({"BAZEFIELD_URL": "https://[scada"}, "write https://HOST"),
    ({"BAZEFIELD_API_KEY": "a\nX-Evil: 1"}, "characters a header cannot carry"),
    ({"BAZEFIELD_API_KEY": "", "BAZEFIELD_API_KEY_FILE": "/no/such/file"},
     "BAZEFIELD_API_KEY_FILE='/no/such/file'"),
    ({"BAZEFIELD_TIMEOUT": "soon"}, "BAZEFIELD_TIMEOUT='soon'"),
    ({"BAZEFIELD_CA_BUNDLE": "/no/such/file"}, "BAZEFIELD_CA_BUNDLE='/no/such/file' is no file"),
    ({"BAZEFIELD_OPERATIONS": "/no/such/file"}, "BAZEFIELD_OPERATIONS='/no/such/file'"),
])
def test_wrong_settings_are_all_named(env, problem):
    with pytest.raises(bazefield.BazefieldError) as exc:
        bazefield.read_settings({"BAZEFIELD_URL": "", "BAZEFIELD_API_KEY": "k"} | env)
    assert problem in str(exc.value)
    assert "p4ss" not in str(exc.value)
    assert "Evil" not in str(exc.value)


@pytest.mark.parametrize(("changes", "problem"), [
    ('{"insert": {}}', "no operation 'insert'; known: metadata, find_objects"),
    ('{"delete": {"path": "/x"}}', "delete: unknown ['path']"),
    ('{"delete": {"verb": 7}}', "delete: verb 7; write GET, POST"),
    ('{"delete": {"route": "api/x"}}', "delete: route 'api/x'; write /api/..."),
    ('{"delete": {"route": "/api/{id}"}}', "delete: {id} in its route; known: []"),
    ('{"allocations": {"route": "/api/{type}"}}', "allocations: {type} in its route; known: ['f"),
    ('{"insert_allocation": {"fields": {"start": ""}}}', "insert_allocation: '' is no name"),
    ('{"delete": {"route": "/api/{"}}', "Single '{' encountered"),
    ('{"delete": {"fields": {"from": "since"}}}', "delete: unknown fields ['from']; known: []"),
    ('{"insert_allocation": {"fields": {"categoryID": "x"}}}', "unknown fields ['categoryID']"),
    ('{"insert_allocation": {"fields": {"start": "End"}}}', "two of its fields have the same"),
    ('{"delete": null}', "delete: write an object of verb"), ('{"delete": []}', "delete: write"),
    ('{"delete": {"fields": null}}', "delete: write an object of verb"),
    ("[" * 5_000, "BAZEFIELD_OPERATIONS="), ("7", "write an object, {"), ("[]", "write an"),
])
def test_operations_that_cannot_be_called_are_named(tmp_path, changes, problem):
    (tmp_path / "operations.json").write_text(changes)
    with pytest.raises(bazefield.BazefieldError) as exc:
        bazefield.read_settings({"BAZEFIELD_OPERATIONS": str(tmp_path / "operations.json")})
    assert problem in str(exc.value)


def test_missing_settings_fail_the_job_before_any_step(delete, monkeypatch):
    job, steps = delete()
    assert (job["state"], steps) == ("Failed", [])
    assert "BAZEFIELD_URL" in job["comment"]
    assert "BAZEFIELD_API_KEY" in job["comment"]


@pytest.mark.parametrize("url", [" https://scada.example/x/ ", "https://scada.example/x\r\n"])
def test_blanks_around_the_url_are_no_part_of_it(url):
    settings = bazefield.read_settings({"BAZEFIELD_URL": url, "BAZEFIELD_API_KEY": "k"})
    assert (settings.host, settings.path) == ("scada.example", "/x")


def test_the_key_comes_from_a_file_too(scada, delete, monkeypatch, tmp_path):
    (tmp_path / "key").write_text("k3y-write\n")
    monkeypatch.delenv("BAZEFIELD_API_KEY")
    monkeypatch.setenv("BAZEFIELD_API_KEY_FILE", str(tmp_path / "key"))
    assert delete()[0]["state"] == "Finished"


def test_the_key_does_not_show(scada):
    assert "k3y" not in repr(bazefield.read_settings())


@pytest.fixture
def certificate(tmp_path):
    files = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    try:
        subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
                        "-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost",
                        "-out", files[0], "-keyout", files[1]], check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl here to make a certificate with")
    return files


def test_tls_is_verified(certificate, monkeypatch, pauses):
    with FakeBazefield(certificate) as scada:
        scada.add_object(LAN_01, "LAN-01")
        monkeypatch.setenv("BAZEFIELD_URL", scada.url)
        monkeypatch.setenv("BAZEFIELD_API_KEY", "k3y-write")
        with pytest.raises(bazefield.BazefieldError, match=r"not trusted.*BAZEFIELD_CA_BUNDLE"):
            bazefield.client().all_names()
        assert scada.log == []
        monkeypatch.setenv("BAZEFIELD_CA_BUNDLE", certificate[0])
        assert bazefield.client().all_names() == ["LAN-01"]
        monkeypatch.setenv("BAZEFIELD_URL", scada.url.replace("localhost", "127.0.0.1"))
        with pytest.raises(bazefield.BazefieldError, match=r"IP address .*; write the host to"):
            bazefield.client().all_names()
        monkeypatch.setenv("BAZEFIELD_CA_BUNDLE", __file__)
        with pytest.raises(bazefield.BazefieldError, match=r"BAZEFIELD_CA_BUNDLE='.*' cannot be"):
            bazefield.client().all_names()
        assert pauses == []


def test_a_host_may_be_an_ipv6_address_without_a_port(plain, monkeypatch):
    monkeypatch.setattr(bazefield_http, "_first_of", lambda addresses, until:
                        socket.create_connection(("127.0.0.1", plain.server_port)))
    for host in ("2001:db8::1", "2001:db8::abcd"):
        settings = replace(bazefield.read_settings(), host=host, port=None)
        assert bazefield_http.connect(settings, time.monotonic() + 1).host == host


def test_an_address_that_is_silent_leaves_the_others_their_time(plain, pauses, monkeypatch):
    monkeypatch.setenv("BAZEFIELD_TIMEOUT", "2")
    with socket.create_server(("127.0.0.2", 0), backlog=0) as silent, socket.socket() as waiting:
        waiting.connect(silent.getsockname())  # its queue is full: others get no answer
        addresses = [(2, 1, 6, "", silent.getsockname()), (2, 1, 6, "", plain.server_address)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda host, port, *more, **names: [
            (2, 1, 6, "", (host, port))] if host[:1].isdigit() else addresses)
        assert len(bazefield.client().all_names()) == 2


def test_one_connection_is_kept(plain, pauses, monkeypatch):
    scada, accepted = plain, []
    get_request = scada.get_request
    monkeypatch.setattr(scada, "get_request", lambda: accepted.append(1) or get_request())
    for _ in range(5):
        bazefield.client().all_names()
    assert len(accepted) == 1


def test_what_must_not_be_sent_twice_goes_over_a_connection_of_its_own(plain, pauses, monkeypatch):
    """On a kept one, hanging up while idle and dying over the request look the same."""
    accepted, get_request = [], plain.get_request
    monkeypatch.setattr(plain, "get_request", lambda: accepted.append(1) or get_request())
    for _ in range(3):
        bazefield.client().all_names()
        insert_once()
    assert len(accepted) == 4


# What goes wrong on the way. A call that must not be repeated shows one try.

def insert_once():
    bazefield.client().insert_allocation(LAN_01, 1, bazefield.Wanted(10, *WANTED[1:]))


@pytest.mark.parametrize("fault", ["drip", "100s", "never"])
def test_the_whole_call_has_a_limit(plain, pauses, monkeypatch, fault):
    monkeypatch.setenv("BAZEFIELD_TIMEOUT", "0.3")
    plain.faults += [("insert_allocation", fault)]
    begun = time.monotonic()
    with pytest.raises(bazefield.LostAnswer, match=r"not complete within 0.3 s \(BAZEFIELD_"):
        insert_once()
    assert 0.25 < time.monotonic() - begun < 2


def test_a_step_that_is_timed_out_leaves_no_half_read_answer(plain, delete, conn):
    conn.execute("UPDATE job_types SET step_timeout = '300 ms'")
    plain.faults += [("read", "drip")]
    _, steps = delete(["ActivePower", "WindSpeed"])
    assert "Timed out" in steps[0]["comment"]
    assert steps[1]["result"] == {"found": 144, "deleted": 144}


def test_a_wait_that_is_too_long_is_named(plain, pauses, monkeypatch):
    monkeypatch.setitem(FAULTS, "429", (429, "slow down", {"Retry-After": "9999"}))
    plain.faults += [("list_objects", "429")]
    with pytest.raises(bazefield.BazefieldError,
                       match=r"status 429: slow down; it asks for 9,999 s until the next$"):
        bazefield.client().all_names()


@pytest.mark.parametrize(("location", "shown"), [
    ("/login?key=KEY", "redirected to '/login', which"), ("http://[::1", "redirected to ''"),
    ("https://localhost/login?key=KEY", "redirected to 'https://localhost/login'"),
    ("https://u:p4ss@elsewhere.example/x", "redirected to 'elsewhere.example'"),
    (None, "status 302: (empty answer)"),
])
def test_where_a_redirection_leads_is_said(plain, pauses, monkeypatch, location, shown):
    monkeypatch.setitem(FAULTS, "redirect", (302, "", {"Location": location}))
    plain.faults += [("list_objects", "redirect")]
    with pytest.raises(bazefield.BazefieldError) as exc:
        bazefield.client().all_names()
    assert shown in str(exc.value)


def test_what_no_server_has_heard_may_be_sent_again(scada, pauses):
    scada.shutdown()
    scada.server_close()
    with pytest.raises(bazefield.BazefieldError, match=r"Connection refused, 5 tries") as exc:
        insert_once()
    assert not isinstance(exc.value, bazefield.LostAnswer)


@pytest.mark.parametrize("length", [None, "999999999999"])
def test_an_answer_without_an_end_is_given_up_at_the_limit(plain, pauses, monkeypatch, length):
    monkeypatch.setattr(bazefield_http, "MAX_ANSWER_BYTES", 1_000_000)
    if length:
        monkeypatch.setitem(FAULTS, "huge", (200, "", {"Content-Length": length}))
    plain.faults += [("list_objects", "huge" if length else "endless")]
    with pytest.raises(bazefield.BazefieldError, match="an answer of more than 1,000,000 bytes"):
        bazefield.client().all_names()
    assert pauses == []  # asking again would not make it shorter
    assert bazefield.client().all_names() == ["LAN-01", "LAN-02"]


def test_a_chunk_of_negative_size_is_not_read_to_the_end(plain, pauses, monkeypatch):
    monkeypatch.setenv("BAZEFIELD_TIMEOUT", "1")
    plain.faults += [("list_objects", "negative chunk")] * bazefield_http.TRIES
    with pytest.raises(bazefield.BazefieldError, match="it was cut short"):
        bazefield.client().all_names()


@pytest.mark.parametrize("large", [0, 10**6])
def test_text_is_the_same_in_small_and_large_answers(scada, pauses, monkeypatch, large):
    monkeypatch.setattr(bazefield_http, "LARGE_BYTES", large)
    names = ["Parque E\u00f3lico", "\u4e00\u2014\U0001f600", 'a"b\\', "\ufeff"]
    monkeypatch.setattr(scada, "do_list_objects", lambda r: "\ufeff" + json.dumps(
        {"data": [{"attributes": {"shortName": name}} for name in names]}, ensure_ascii=False))
    assert bazefield.client().all_names() == names


def test_compressed_answers_are_refused_in_words(scada, pauses):
    scada.faults += [("list_objects", "gzip")]
    with pytest.raises(bazefield.BazefieldError, match=r"the answer is compressed \(gzip\)"):
        bazefield.client().all_names()


def test_an_answer_may_end_with_the_connection(scada, pauses):
    scada.faults += [("list_objects", "until closed")]
    assert bazefield.client().all_names() == ["LAN-01", "LAN-02"]


@pytest.mark.parametrize("way", ["late 408", "hangs up"])
def test_connections_that_end_while_idle_are_no_error(plain, pauses, way):
    plain.ways.hangs_up = way == "hangs up"
    for _ in range(5):
        plain.faults += [("list_objects", way)]
        assert len(bazefield.client().all_names()) == 2
        wait_for(bazefield.client()._connection.sock.is_stale)
        assert len(bazefield.client().all_names()) == 2
        insert_once()
    assert pauses == []
    assert len(plain.allocations) == 5


@pytest.mark.parametrize("interim", [1, 50])
def test_interim_answers_are_passed_over(plain, pauses, interim):
    plain.ways.interim = interim
    assert len(bazefield.client().all_names()) == 2


@pytest.mark.parametrize("operation", ["find_objects", "points", "read", "allocation_types",
                                       "allocation_categories", "allocations", "allocation"])
def test_an_answer_of_any_shape_is_understood_or_named(plain, insert, delete, monkeypatch,
                                                      operation):
    monkeypatch.setitem(FAULTS, "nothing", (204, "", {"Content-Length": None}))
    plain.add_allocation(LAN_01, 11, T0, T0 + 1)
    job = delete if operation in ("points", "read") else insert
    more = {} if job is delete else {"on_overlap": "replace"}
    for fault in ("text", "list", "strange", "deep", "huge number", "nothing"):
        plain.faults += [(operation, fault)]
        _, steps = job(objects=["LAN-02" if operation == "find_objects" else "LAN-01"], **more)
        assert plain.faults == []
        if (operation, fault) == ("find_objects", "nothing"):
            assert "Bazefield has no object named 'LAN-02'" in steps[0]["comment"]
        else:
            assert steps[0]["comment"].startswith(operation + ": ")
    assert not plain.calls("insert_allocation") + plain.calls("delete")


# Nothing secret, nothing that moves a terminal.

KEY = "k3y+wr/te"


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("fault", ["401", "html", "redirect", "controls", "status line"])
def test_the_key_is_masked_however_it_is_spelled(scada, pauses, monkeypatch, spelling, fault):
    monkeypatch.setenv("BAZEFIELD_API_KEY", KEY)
    scada.keys[KEY] = {"read", "write"}
    scada.key_spelling = spelling
    scada.faults += [("list_objects", fault)] * bazefield_http.TRIES
    with pytest.raises(bazefield.BazefieldError) as exc:
        bazefield.client().all_names()
    shown = "".join(traceback.format_exception(exc.value))
    assert not bazefield_http.secret_pattern(KEY).search(shown)
    assert SPELLINGS[spelling](KEY)[3:-4] not in shown


def test_the_key_is_in_no_comment_and_no_log(scada, delete, caplog):
    scada.faults += [("read", "401")]
    job, steps = delete()
    assert "key *** has expired" in steps[0]["comment"]
    assert "k3y" not in json.dumps([job, steps], default=str) + caplog.text


def test_the_key_is_masked_in_names_too(scada, delete, caplog):
    scada.add_object("1164AFE219C9DFFF", "LAN k3y-write")
    scada.objects[LAN_01]["points"] = {"k3y-write": {}}
    _, steps = delete(["key-write"], ["LAN-01", "LAN"])
    assert "nearest: '***'" in steps[0]["comment"]
    assert "nearest: 'LAN-0" in steps[1]["comment"]
    assert "k3y" not in caplog.text + steps[0]["comment"] + steps[1]["comment"]


def test_half_a_key_at_the_end_of_what_is_read_does_not_show(scada, pauses):
    padding = "k3y-write" * 4_000
    text = bazefield.client()._said(bytearray(b" " * 5 + padding.encode()))
    assert "k3y" not in text


@pytest.mark.parametrize("text", ["\\" * 20_000, "%25" * 7_000, "k3y" + "\n" * 20_000,
                                  "&#0" * 7_000, "k3y-writ" * 3_000_000])
def test_looking_for_the_key_takes_no_time(scada, pauses, text):
    bazefield.client().hide("")
    begun = time.monotonic()
    assert len(str(bazefield.client().error("read", text))) <= 400
    assert time.monotonic() - begun < 1


def test_control_characters_are_shown_as_text(scada, delete, caplog):
    scada.faults += [("read", "controls")]
    _, steps = delete()
    assert steps[0]["comment"] == r"read: status 500: \x1b[2J\x07 *** \x9b31m"
    assert "\x1b" not in caplog.text


def test_control_characters_are_visible_wherever_they_come_from():
    text = "a\x1b[2J\x7f\x9b\r\u202eb\tc\r\nd"
    shown = "a\\x1b[2J\\x7f\\x9b\\x0d\\u202eb\tc\nd"
    assert perfdb.clean(text) == shown
    record = logging.LogRecord("x", logging.ERROR, "", 0, "%s", (text,), None)
    assert perfdb.LogFormatter("%(message)s").format(record) == shown
    assert tables.text(text) == shown.replace("\n", " ").replace("\t", " ")


def test_json_holds_no_control_character_and_the_same_text(capsys):
    text = "a\x1b\x7f\x9b\u202e\u00e9"
    tables.print_json({"comment": text})
    shown = capsys.readouterr().out
    assert json.loads(shown) == {"comment": text}
    assert not perfdb.CONTROL.search(shown)
    assert "\u00e9" in shown


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfk3y-write\r\n", "k3y-write".encode("utf-16"),
                                     b"\n k3y-write \n"])
def test_a_byte_order_mark_is_no_part_of_the_key(tmp_path, content):
    (tmp_path / "key").write_bytes(content)
    settings = bazefield.read_settings({"BAZEFIELD_URL": "https://scada.example",
                                        "BAZEFIELD_API_KEY_FILE": str(tmp_path / "key")})
    assert settings.key == "k3y-write"


@pytest.mark.parametrize(("mode", "warnings"), [(0o600, 0), (0o644, 1), (0o640, 1)])
def test_a_key_file_that_others_may_read_is_warned_of_once(tmp_path, caplog, mode, warnings):
    file = tmp_path / f"key{mode}"
    file.write_text("k3y-write")
    file.chmod(mode)
    for _ in range(3):
        bazefield.read_settings({"BAZEFIELD_URL": "https://scada.example",
                                 "BAZEFIELD_API_KEY_FILE": str(file)})
    assert caplog.text.count("may be read by others") == warnings
    assert "k3y" not in caplog.text


def test_a_key_in_the_variable_for_its_file_does_not_show():
    with pytest.raises(bazefield.BazefieldError) as exc:
        bazefield.read_settings({"BAZEFIELD_URL": "https://scada.example",
                                 "BAZEFIELD_API_KEY_FILE": "k3y-write"})
    assert "k3y" not in str(exc.value)
