"""S3 at its worst: a server that fails on command, answers the user can act on, bounds on waiting."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plmsae_cli.config.experiment import Storage
from plmsae_cli.store import s3_client
from plmsae_cli.store.fs import DamagedError, MissingError, Store, StoreError
from plmsae_cli.store.s3 import S3Objects

ROOT = Path(__file__).parents[2]


class Unruly(ThreadingHTTPServer):
    """Enough of S3 for objects by name; each request first obeys the next command of `script`, if any.

    Commands: `503`, `403:AccessDenied`, ... (a status and a code), `hang`, `reset`, `half` (a body cut short
    under a full Content-Length), `drip` (a byte at a time), `short` (a PUT that keeps half of the object).
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), UnrulyHandler)
        self.objects: dict[str, bytes] = {}
        self.script: list[str] = []
        self.always: str | None = None
        self.requests: list[str] = []
        self.closing = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Broken connections are the point."""


class UnrulyHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Unruly

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _serve(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.requests.append(f"{self.command} {self.path}")
        command = self.server.always or (self.server.script.pop(0) if self.server.script else "")
        if command[:3].isdigit():
            status, _, code = command.partition(":")
            answer = f"<Error><Code>{code}</Code><Message>on command</Message></Error>" if code else ""
            self._answer(int(status), b"" if self.command == "HEAD" else answer.encode())
            return
        if command == "hang":
            self.server.closing.wait()
        if command in ("hang", "reset"):
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if self.command == "PUT":
            self.server.objects[self.path] = body[: len(body) // 2] if command == "short" else body
            self._answer(200, b"", ETag='"1"')
        elif self.command == "DELETE":
            self.server.objects.pop(self.path, None)
            self._answer(204, b"")
        elif self.path not in self.server.objects:
            self._answer(404, b"")
        else:
            self._answer_object(self.server.objects[self.path], command)

    do_GET = do_HEAD = do_PUT = do_DELETE = _serve

    def _answer_object(self, data: bytes, command: str) -> None:
        headers = {"ETag": '"1"', "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT"}
        status = 200
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), min(int(match[2] or len(data) - 1), len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            data, status = data[first : last + 1], 206
        self._answer(status, data, command, **headers)

    def _answer(self, status: int, data: bytes, command: str = "", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if command == "half":
            self.wfile.write(data[: len(data) // 2])
            self.connection.shutdown(socket.SHUT_RDWR)
        elif command == "drip":
            for byte in data:
                if self.server.closing.wait(0.05):
                    return
                self.wfile.write(bytes([byte]))
        else:
            self.wfile.write(data)


@pytest.fixture
def unruly(s3_credentials: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Unruly]:
    """A server to command; clients make at most 4 attempts, one soon after the other."""
    retry = {"max_retries": 3, "retry_timeout": timedelta(seconds=60)}
    monkeypatch.setattr(s3_client, "_RETRY", {**retry, "backoff": {"init_backoff": timedelta(milliseconds=5)}})
    server = Unruly()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def hurried(fault: str, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Clients wait a second where the fault is that no answer comes: then a sound request, too, may be asked again."""
    if fault in ("hang", "drip"):
        monkeypatch.setattr(s3_client, "_CLIENT", {"connect_timeout": "1s", "read_timeout": "1s", "timeout": "1s"})
    return fault in ("hang", "drip")


def store_at(server: Unruly) -> Store:
    return Store(Storage(endpoint_url=f"http://127.0.0.1:{server.server_port}", allow_http=True))


DATA = np.random.default_rng(0).bytes(600)


@pytest.mark.parametrize("fault", ["500", "503:SlowDown", "reset", "half", "hang"])
def test_faults_that_pass_are_survived(unruly: Unruly, fault: str, hurried: bool) -> None:
    unruly.objects["/b/x"] = DATA
    unruly.script = [fault, fault]
    assert store_at(unruly).read("s3://b/x") == DATA
    unruly.script = [fault]
    assert store_at(unruly).read("s3://b/x", 100, 300) == DATA[100:400]
    assert len(unruly.requests) == 5 or hurried


@pytest.mark.parametrize("fault", ["500", "503:SlowDown", "reset", "hang", "drip", "half"])
def test_faults_that_stay_are_told(unruly: Unruly, fault: str, hurried: bool) -> None:
    unruly.objects["/b/x"] = DATA
    unruly.always = fault
    with pytest.raises(StoreError) as caught:
        store_at(unruly).read("s3://b/x")
    assert len(unruly.requests) <= 4 or fault in ("half", "drip")  # a body's retries are counted apart
    assert "s3://b/x" in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("fault", ["500", "503:SlowDown", "reset"])
def test_uploads_survive_the_same(unruly: Unruly, fault: str) -> None:
    unruly.script = [fault, fault]
    assert store_at(unruly).write("s3://b/x", [DATA]).size == len(DATA)
    assert unruly.objects == {"/b/x": DATA}


def test_what_another_process_has_written_there_since_is_not_taken_for_ours_cut_short(
    s3: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two attempts at one task, whose records differ in their times."""
    url, real = s3.url("parts/a.json"), S3Objects._head

    def replaced(self: S3Objects, path: str) -> Any:
        monkeypatch.setattr(S3Objects, "_head", real)
        s3.store().write(url, [b"another attempt's"])
        return real(self, path)

    monkeypatch.setattr(S3Objects, "_head", replaced)
    assert s3.store().write(url, [b"ours"]).size == 4
    assert s3.store().read(url) == b"another attempt's"


def test_an_object_stored_short_is_caught_and_removed(unruly: Unruly) -> None:
    unruly.script = ["short"]
    with pytest.raises(StoreError, match=r"s3://b/x was stored short.*600 bytes were sent, 300 kept"):
        store_at(unruly).write("s3://b/x", [DATA])
    assert unruly.objects == {}


@pytest.mark.parametrize(
    ("answer", "words", "hint"),
    [
        ("403:AccessDenied", "permission denied", "storage.profile"),
        ("403:InvalidAccessKeyId", "does not know the access key", "AWS_ACCESS_KEY_ID"),
        ("403:SignatureDoesNotMatch", "secret key is wrong", "AWS_SECRET_ACCESS_KEY"),
        ("400:ExpiredToken", "credentials have expired", "log in again"),
        ("404:NoSuchBucket", "no such bucket", "storage.endpoint_url"),
        ("301:PermanentRedirect", "another region", "storage.region"),
        ("404", "no S3 server", "storage.endpoint_url"),
    ],
)
def test_refusals_are_told_at_once_and_not_retried(unruly: Unruly, answer: str, words: str, hint: str) -> None:
    unruly.always = answer
    store = store_at(unruly)
    calls: list[Callable[[], object]] = [lambda: store.probe("s3://b/folder")]
    if answer != "404":
        calls += [lambda: store.read("s3://b/x"), lambda: store.write("s3://b/x", [b"1"])]
    for call in calls:
        unruly.requests.clear()
        with pytest.raises(StoreError) as caught:
            call()
        assert len(unruly.requests) == 1
        assert words in caught.value.message
        assert "\n" not in caught.value.message
        assert hint in (caught.value.hint or "")


def test_probe_is_in_haste(unruly: Unruly) -> None:
    """Where a read would wait for two minutes."""
    unruly.always = "hang"
    start = time.monotonic()
    with pytest.raises(StoreError, match="does not answer") as caught:
        store_at(unruly).probe("s3://b/folder")
    assert time.monotonic() - start < 100
    assert "storage.endpoint_url" in (caught.value.hint or "")


def test_nobody_at_the_endpoint(s3_credentials: None) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound but not listening: connections are refused
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(StoreError, match=f"{address} does not answer"):
            Store(Storage(endpoint_url=address, allow_http=True)).probe("s3://b/folder")


def test_plain_http_needs_leave(s3: Any) -> None:
    store = Store(Storage(endpoint_url=s3.endpoint_url))
    for call in (lambda: store.probe(s3.url()), lambda: store.write(s3.url("x"), [b"1"])):
        with pytest.raises(StoreError, match="plain http") as caught:
            call()
        assert "storage.allow_http: true" in (caught.value.hint or "")
    assert s3.store().list(s3.url()) == {}


def test_no_such_bucket_on_a_real_server(s3: Any) -> None:
    for call in (
        lambda u: s3.store().probe(u),
        lambda u: s3.store().write(u + "/x", [b"1"]),
        s3.store().list,
    ):
        with pytest.raises(StoreError, match="no such bucket"):
            call("s3://no-such-bucket-here")


def test_no_credentials_and_anonymous(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    s3.store().write(s3.url("x"), [b"1"])
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(StoreError, match="no credentials") as caught:
        s3.store().probe(s3.url())
    assert "storage.anonymous: true" in (caught.value.hint or "")
    store = Store(Storage(endpoint_url=s3.endpoint_url, allow_http=True, anonymous=True))
    with pytest.raises(StoreError, match="permission denied"):
        store.exists(s3.url("x"))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing-secret")
    client = s3.client()
    client.put_bucket_acl(Bucket=s3.bucket, ACL="public-read")
    client.put_object_acl(Bucket=s3.bucket, Key="x", ACL="public-read")
    store.probe(s3.url())
    assert store.read(s3.url("x")) == b"1"


def test_profile(s3: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text("[lab]\naws_access_key_id = k\naws_secret_access_key = s\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    storage = Storage(endpoint_url=s3.endpoint_url, allow_http=True, profile="lab")
    Store(storage).probe(s3.url(), write=True)
    with pytest.raises(StoreError, match=r"no credentials .*labour"):
        Store(storage.model_copy(update={"profile": "labour"})).probe(s3.url())


@pytest.mark.parametrize("url", ["s3://", "s3:///key", "s3://a b/key"])
def test_urls_without_a_bucket(url: str) -> None:
    with pytest.raises(StoreError, match="names no bucket"):
        Store().exists(url)


def test_a_bucket_is_no_object(s3: Any) -> None:
    with pytest.raises(StoreError, match="names a bucket, not an object"):
        s3.store().write(s3.url(), [b""])
    with pytest.raises(StoreError, match="empty path segment"):
        s3.store().write(s3.url("a//b"), [b""])


def test_downloads_are_cached_until_the_object_changes(unruly: Unruly, tmp_path: Path) -> None:
    unruly.objects["/b/deep/x.bin"] = DATA
    first = store_at(unruly).local("s3://b/deep/x.bin")
    assert first.name == "x.bin"
    assert first.read_bytes() == DATA
    assert first.is_relative_to(tmp_path / "plmsae-cache" / "s3")
    unruly.requests.clear()
    assert store_at(unruly).local("s3://b/deep/x.bin") == first
    assert unruly.requests == ["HEAD /b/deep/x.bin"]
    unruly.objects["/b/deep/x.bin"] = DATA[:9]
    assert store_at(unruly).local("s3://b/deep/x.bin").read_bytes() == DATA[:9]


def test_an_object_replaced_during_a_download_is_not_mixed(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    store = s3.store()
    store.write(s3.url("x"), [bytes(100)])
    files = store._at(s3.url("x"))
    old_head = files._head(s3.url("x"))
    store.write(s3.url("x"), [b"1" * 100])
    monkeypatch.setattr(files, "_head", lambda path: old_head)
    for read in (store.local, lambda path: store.read(path, 1)):
        with pytest.raises(StoreError, match="replaced while it was read"):
            read(s3.url("x"))


def test_missing_and_short_objects(unruly: Unruly) -> None:
    unruly.objects["/b/x"] = DATA
    store = store_at(unruly)
    with pytest.raises(MissingError, match="s3://b/y: there is no such object"):
        store.size("s3://b/y")
    with pytest.raises(DamagedError, match="bytes 500 to 700 were asked for, 100 came"):
        store.read("s3://b/x", 500, 200)


FORK = """
import os, sys
from plmsae_cli.config.experiment import Storage
from plmsae_cli.store.fs import Store
store = Store(Storage(endpoint_url=sys.argv[1], allow_http=True))
store.probe(sys.argv[2])
child = os.fork()
if child == 0:
    try:
        store.list(sys.argv[2])
    except AssertionError as error:
        os._exit(7 if "spawn" in str(error) else 8)
    os._exit(9)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_forked_child_is_told_rather_than_left_to_hang(s3: Any) -> None:
    command = [sys.executable, "-c", FORK, s3.endpoint_url, s3.url()]
    assert subprocess.run(command, cwd=ROOT).returncode == 7
