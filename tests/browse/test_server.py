"""Who is answered, and with what."""

from __future__ import annotations

import http.client
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.browse.server import Server
from plmsae_cli.config.errors import UserError


def read(run: int, sequence: str) -> dict[str, Any]:
    if not sequence.isalpha():
        raise UserError("no letters", "paste some")
    return {"run": run, "length": len(sequence)}


@contextmanager
def serving(folder: Path, host: str) -> Iterator[Server]:
    with Server(folder, host, 0, read) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    site = tmp_path / "site"
    (site / "data").mkdir(parents=True)
    (site / "index.html").write_text("<h1>pages</h1>")
    (site / "data" / "site.js").write_text("plmsae.put(1)")
    (site / ".hidden").write_text("secret")
    (tmp_path / "secret.txt").write_text("secret")
    (site / "link.txt").symlink_to(tmp_path / "secret.txt")
    return site


def ask(
    server: Server, path: str, method: str = "GET", body: str | None = None, **headers: str
) -> tuple[int, dict[str, str], bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    if body is not None:
        connection.putheader("Content-Length", str(len(body)))
    connection.endheaders(None if body is None else body.encode())
    answer = connection.getresponse()
    found = answer.status, dict(answer.getheaders()), answer.read()
    connection.close()
    return found


def test_files_of_the_folder_alone(folder: Path) -> None:
    with serving(folder, "127.0.0.1") as server:
        status, headers, body = ask(server, "/")
        assert (status, body) == (200, b"<h1>pages</h1>")
        assert "script-src 'self';" in headers["Content-Security-Policy"]
        assert ask(server, "/data/site.js")[1]["Content-Type"].startswith("text/javascript")
        for path in (
            "/../secret.txt",
            "/%2e%2e/secret.txt",
            "/data/..%2f..%2fsecret.txt",
            "//etc/passwd",
            "/link.txt",
            "/.hidden",
            "/data",
            "/%00",
        ):
            status, _, body = ask(server, path)
            assert status == 404, path
            assert b"secret" not in body


def test_other_names_are_refused(folder: Path) -> None:
    with serving(folder, "127.0.0.1") as server:
        assert ask(server, "/", Host="rebound.example:80")[0] == 403
        assert ask(server, "/", Host="localhost:1")[0] == 200
        assert server.token is None


def test_the_newer_protocol(folder: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with serving(folder, "::1") as server:
        host, port, *_ = server.server_address
        assert (server.token, server.address) == (None, f"http://[::1]:{port}/")
        connection = http.client.HTTPConnection(str(host), int(port), timeout=10)
        connection.request("GET", "/")
        assert connection.getresponse().status == 200
        connection.close()


def test_a_token_beyond_this_machine(folder: Path) -> None:
    with serving(folder, "0.0.0.0") as server:
        assert server.token is not None
        assert server.address.endswith(f"/?token={server.token}")
        assert ask(server, "/")[0] == ask(server, "/?token=wrong")[0] == ask(server, "/data/site.js")[0] == 403
        assert ask(server, "/", Cookie="plmsae_token=wrong")[0] == 403
        body = json.dumps({"run": 0, "sequence": "MK"})
        assert ask(server, "/api/sequence", "POST", body, Content_Type="application/json")[0] == 403
        status, headers, _ = ask(server, f"/?token={server.token}")
        assert (status, headers["Location"]) == (303, "/")
        assert "HttpOnly" in headers["Set-Cookie"]
        assert "SameSite=Strict" in headers["Set-Cookie"]
        cookie = headers["Set-Cookie"].partition(";")[0]
        assert ask(server, "/data/site.js", Cookie=cookie)[0] == 200


def test_sequences(folder: Path) -> None:
    with serving(folder, "127.0.0.1") as server:
        body = json.dumps({"run": 1, "sequence": "MKV"})
        status, _, answer = ask(server, "/api/sequence", "POST", body, Content_Type="application/json")
        assert (status, json.loads(answer)) == (200, {"run": 1, "length": 3})
        assert ask(server, "/api/sequence", "POST", body, Content_Type="text/plain")[0] == 400  # what a form can send
        assert ask(server, "/api/sequence", "POST", "{}", Content_Type="application/json")[0] == 400
        assert ask(server, "/api/sequence", "POST", " " * 70_000, Content_Type="application/json")[0] == 400
        wrong = json.dumps({"run": 0, "sequence": "12"})
        status, _, answer = ask(server, "/api/sequence", "POST", wrong, Content_Type="application/json")
        assert (status, json.loads(answer)) == (422, {"error": "no letters; paste some"})


def test_a_port_in_use_is_said(folder: Path) -> None:
    with serving(folder, "127.0.0.1") as server, pytest.raises(UserError, match=r"cannot listen on 127\.0\.0\.1"):
        Server(folder, "127.0.0.1", server.server_address[1], read)


def raw(server: Server, request: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=60) as connection:
        connection.sendall(request)
        return connection.makefile("rb").read(64)


def test_what_is_no_request_is_told_so(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    local, post = b"Host: localhost\r\nConnection: close\r\n", b"POST /api/sequence HTTP/1.1\r\n"
    json_header = local + b"Content-Type: application/json\r\n"
    with serving(folder, "127.0.0.1") as server:
        assert b" 404 " in raw(server, b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\n" + local + b"\r\n")
        assert b" 403 " in raw(server, b"GET / HTTP/1.1\r\nHost: [\r\nConnection: close\r\n\r\n")
        for length in (b"-1", b"many", b"9" * 5000):  # of -1 bytes there is no end
            assert b" 400 " in raw(server, post + json_header + b"Content-Length: " + length + b"\r\n\r\n")
        for body in (b'{"run": Infinity, "sequence": "M"}', b"[" * 60_000, b"\xff"):
            length = b"Content-Length: %d\r\n\r\n" % len(body)
            assert b" 400 " in raw(server, post + json_header + length + body)
        # A body that nobody read is no next request.
        smuggled = b"GET /secret HTTP/1.1\r\nHost: localhost\r\n\r\n"
        refused = b"POST / HTTP/1.1\r\nHost: other\r\nContent-Length: %d\r\n\r\n" % len(smuggled)
        with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=60) as connection:
            connection.sendall(refused + smuggled)
            assert connection.makefile("rb").read().count(b"HTTP/1.1 ") == 1
    assert capfd.readouterr().err == ""
