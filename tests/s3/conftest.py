"""A proxy in front of a real S3 server, which misbehaves on command."""

from __future__ import annotations

import http.client
import random
import re
import socket
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import plmsae_cli
from plmsae_cli.config.experiment import Storage
from plmsae_cli.store import s3_client
from plmsae_cli.store.fs import Store

FAULTS = ("500", "503", "SlowDown", "reset", "half", "lost")


class Proxy(ThreadingHTTPServer):
    """Passes requests on. `choose(method, path)` names the fault of a request, or nothing.

    `403`, `500`, `503`, `SlowDown`: an answer instead of the server's. `reset`: the connection breaks before that.
    `half`: the server's answer, cut in the middle of its body. `drip`: its body a byte at a time. `lost`: the server does it,
    the answer never comes back. `short`: an upload is passed on without its second half.
    """

    daemon_threads = True

    def __init__(self, behind: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = behind.removeprefix("http://")
        self.choose: Callable[[str, str], str] = lambda method, path: ""
        self.requests: list[tuple[str, str, str]] = []
        self.lock = threading.Lock()
        self.closing = threading.Event()

    def fail(self, pattern: str, fault: str, times: int = 1 << 30) -> None:
        """The first `times` requests whose `METHOD path` match the pattern get this fault."""
        left = [times]

        def choose(method: str, path: str) -> str:
            if not re.search(pattern, f"{method} {path}") or left[0] == 0:
                return ""
            left[0] -= 1
            return fault

        self.choose = choose

    def fail_at_random(self, share: float, seed: int) -> None:
        """Any request this often, with any fault but a drip; never two in a row, so that no request runs out of attempts."""
        chance, last = random.Random(seed), [True]

        def choose(method: str, path: str) -> str:
            last[0] = not last[0] and chance.random() < share
            return chance.choice(FAULTS) if last[0] else ""

        self.choose = choose

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken connections are the point."""

    def storage(self, **options: Any) -> Storage:
        return Storage(endpoint_url=f"http://127.0.0.1:{self.server_port}", allow_http=True, **options)

    def store(self) -> Store:
        return Store(self.storage())


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _pass(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with self.server.lock:
            fault = self.server.choose(self.command, self.path)
            self.server.requests.append((self.command, self.path, fault))
        if fault in ("500", "503", "SlowDown"):
            code = "SlowDown" if fault == "SlowDown" else "InternalError"
            text = b"" if self.command == "HEAD" else f"<Error><Code>{code}</Code></Error>".encode()
            self._answer(500 if fault == "500" else 503, [], text)
            return
        if fault == "403":
            self._answer(403, [], b"<Error><Code>AccessDenied</Code></Error>")
            return
        if fault == "reset":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if fault == "short" and self.command == "PUT":
            body = body[: len(body) // 2]
        server = http.client.HTTPConnection(self.server.behind, timeout=240)
        headers = {k: v for k, v in self.headers.items() if k.lower() not in ("content-length", "expect", "connection")}
        server.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
        answer = server.getresponse()
        data = answer.read()
        dropped = ("transfer-encoding", "connection", "content-length", "server", "date")
        kept = [(k, v) for k, v in answer.getheaders() if k.lower() not in dropped]
        length = answer.getheader("Content-Length") if self.command == "HEAD" else None
        server.close()
        if fault == "lost":
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self._answer(answer.status, kept, data, fault, length)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass

    def _answer(
        self, status: int, headers: list[tuple[str, str]], data: bytes, fault: str = "", length: str | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", length or str(len(data)))
        self.end_headers()
        if self.command == "HEAD" or not data:
            return
        if fault == "half":
            self.wfile.write(data[: len(data) // 2])
            self.connection.shutdown(socket.SHUT_RDWR)
        elif fault == "drip":
            for byte in data:
                if self.server.closing.wait(0.1):
                    return
                self.wfile.write(bytes([byte]))
        else:
            self.wfile.write(data)


@pytest.fixture
def proxy(s3: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """Clients made now make at most 4 attempts, one soon after the other."""
    retry = {"max_retries": 3, "retry_timeout": timedelta(seconds=60)}
    monkeypatch.setattr(s3_client, "_RETRY", {**retry, "backoff": {"init_backoff": timedelta(milliseconds=5)}})
    server = Proxy(s3.endpoint_url)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(scope="session")
def smoke_fasta() -> Path:
    """The 80 short proteins of the package."""
    return Path(plmsae_cli.__file__).parent / "data" / "smoke.fasta.gz"
