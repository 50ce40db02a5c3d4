"""`plmsae browse`: the folder of a site over HTTP, and one's own sequences through its dictionary.

Only files of the folder are served. Requests must name this server as their host, so that no other page reaches it by a name
that leads here; where it listens on other than the local machine, a token must come along, once in the address and then as a
cookie.
"""

from __future__ import annotations

import json
import mimetypes
import re
import secrets
import socket
from collections.abc import Callable, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from plmsae_cli.config.errors import UserError

LOCAL = ("127.0.0.1", "localhost", "::1")
COOKIE = "plmsae_token"
_HOST = re.compile(r"(?:127\.0\.0\.1|localhost|\[::1\])(?::\d*)?", re.IGNORECASE)
LARGEST = 64 * 1024
"""Bytes of a request's body."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:;"
    " connect-src 'self' https://alphafold.ebi.ac.uk; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}
Reader = Callable[[int, str], dict[str, Any]]
"""(number of the dictionary, sequence) to what its page shows; raises UserError."""


class Server(ThreadingHTTPServer):
    """One site."""

    daemon_threads = True

    def __init__(self, folder: Path, host: str, port: int, read: Reader) -> None:
        self.folder, self.read = folder.resolve(), read
        self.token = None if host in LOCAL else secrets.token_urlsafe(16)
        self.host = f"[{host}]" if ":" in host else host
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except OSError as error:
            raise UserError(
                f"cannot listen on {host}:{port}: {error.strerror}", "choose another with --port"
            ) from error

    @property
    def address(self) -> str:
        """What to open in a browser."""
        port = self.server_address[1]
        token = f"?token={self.token}" if self.token else ""
        return f"http://{self.host}:{port}/{token}"


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    timeout = 60
    """Seconds that a connection may say nothing, so that silent ones do not gather."""

    def do_GET(self) -> None:
        if self._refused():
            return
        path = urlsplit(self.path).path
        if path == "/api/ready":
            self._json(HTTPStatus.OK, {"ready": True})
            return
        file = self._file(unquote(path))
        if file is None:
            self._json(HTTPStatus.NOT_FOUND, {"error": "no such file"})
            return
        kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        self._answer(HTTPStatus.OK, file.read_bytes(), "text/javascript" if file.suffix == ".js" else kind)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        if self._refused():
            return
        length = self.headers.get("Content-Length", "")
        sized = re.fullmatch("[0-9]{1,9}", length) and int(length) <= LARGEST
        # A form of another site cannot send JSON without asking first, which nobody here allows.
        if self.path != "/api/sequence" or self.headers.get_content_type() != "application/json" or not sized:
            self.close_connection = True
            self._json(HTTPStatus.BAD_REQUEST, {"error": "a sequence is wanted, as JSON of at most 64 kB"})
            return
        try:
            body = json.loads(self.rfile.read(int(length)))
            run, sequence = int(body["run"]), str(body["sequence"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            self._json(HTTPStatus.BAD_REQUEST, {"error": 'wanted: {"run": 0, "sequence": "MK..."}'})
            return
        try:
            self._json(HTTPStatus.OK, self.server.read(run, sequence))
        except UserError as error:
            words = f"{error.message}; {error.hint}" if error.hint else error.message
            self._json(HTTPStatus.UNPROCESSABLE_ENTITY, {"error": words})

    def _refused(self) -> bool:
        """Answers and says yes where the request is not from one who may ask."""
        if self.server.token is None:
            if _HOST.fullmatch(self.headers.get("Host", "")):
                return False
            return self._refuse("this server answers to its own name only")
        given = parse_qs(urlsplit(self.path).query).get("token", [""])[0]
        if secrets.compare_digest(given.encode(), self.server.token.encode()):
            self.send_response(HTTPStatus.SEE_OTHER)
            self.send_header("Location", "/")
            self.send_header("Set-Cookie", f"{COOKIE}={self.server.token}; HttpOnly; SameSite=Strict; Path=/")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return True
        cookies = dict(one.strip().partition("=")[::2] for one in self.headers.get("Cookie", "").split(";"))
        if secrets.compare_digest(cookies.get(COOKIE, "").encode(), self.server.token.encode()):
            return False
        return self._refuse("open the address that plmsae browse printed: it holds a token")

    def _refuse(self, words: str) -> bool:
        self.close_connection = True  # what else came, such as a body, is not read as the next request
        self._json(HTTPStatus.FORBIDDEN, {"error": words})
        return True

    def _file(self, path: str) -> Path | None:
        """The file of the site that a path names; None for anything outside its folder."""
        wanted = path.lstrip("/") or "index.html"
        if "\x00" in wanted or any(part.startswith(".") for part in wanted.split("/")):
            return None
        file = (self.server.folder / wanted).resolve()
        try:
            return file if file.is_relative_to(self.server.folder) and file.is_file() else None
        except OSError:  # a name too long for any file
            return None

    def _json(self, status: HTTPStatus, body: Any) -> None:
        self._answer(status, json.dumps(body).encode(), "application/json")

    def _answer(self, status: HTTPStatus, body: bytes, kind: str) -> None:
        self.send_response(status)
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Content-Type", f"{kind}; charset=utf-8" if kind.startswith("text/") else kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing: requests are no news to the one who makes them."""


def sequence_reader(runs: Sequence[Path]) -> Reader:
    """Own sequences through the dictionaries of these runs, each opened when it is first asked for."""
    from plmsae_cli.browse.own import OwnSequences

    return OwnSequences(runs).read
