"""After a failure: tried again, waited for, or let go, by what kind of failure it was."""

from __future__ import annotations

import errno
import shutil
import threading
from collections import namedtuple
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment, Storage
from plmsae_cli.executors import trouble
from plmsae_cli.executors.trouble import Recovery, passing
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.task import TaskFailed
from plmsae_cli.store.fs import Store
from plmsae_cli.store.records import DamagedError, StoreError

EXPIRED = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
LISTING = (
    b'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>b</Name><Prefix></Prefix>'
    b"<KeyCount>0</KeyCount><MaxKeys>1000</MaxKeys><IsTruncated>false</IsTruncated></ListBucketResult>"
)
FULL = StoreError("cannot write x: the disk is full; 5 bytes needed, 0 free", "free some space")
OWN = UserError("train.sae.k is larger than the dictionary", "lower k")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trouble, "BACKOFF_S", (0.0, 0.0))
    monkeypatch.setattr(trouble, "CHECK_EVERY_S", 0.01)


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    embed = {"fasta": "x", "layers": [1]}
    return Experiment.model_validate({"name": "x", "root": str(tmp_path / "runs"), "embed": embed})


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (TaskFailed("shard-1", "its worker died twice (exit -9)", lost=True), True),
        (TaskFailed("shard-1", "ValueError: no"), False),
        (StoreError("cannot read x: AWS answered 503 to every attempt", "start again later: what is complete is kept"), True),
        (StoreError("cannot read x: AWS does not answer", "check the network and storage.endpoint_url"), True),
        (StoreError("cannot read x: permission denied", "check the credentials"), False),
        (DamagedError("x is cut short", "remove it"), False),
        (ConnectionResetError("reset"), True),
        (OSError(errno.ESTALE, "Stale file handle"), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (OWN, False),
        (RuntimeError("a bug"), False),
    ],
)  # fmt: skip
def test_what_may_pass_is_tried_again_a_few_times(error: Exception, again: bool, experiment: Experiment) -> None:
    assert passing(error) == again
    said: list[str] = []
    recovery = Recovery(said.append)
    tries = [recovery.again(Path("a.yaml"), error, experiment, wait=False) for _ in range(4)]
    assert tries == [again, again, False, False]
    assert len(said) == 2 * again


def test_somebody_who_waits_at_a_terminal_hears_within_half_a_minute() -> None:
    assert sum(trouble.BRIEF_S) <= 30
    assert Recovery(print, patient=False)._pauses == trouble.BRIEF_S


def test_a_full_disk_is_waited_for_and_an_own_error_beside_it_is_not(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter([100, 100, 100, 100, 250, 150, 4 << 30, 4 << 30])
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage(0, 0, next(free)))
    said: list[str] = []
    assert not Recovery(said.append).again(Path("a.yaml"), OWN, experiment)
    assert said == []
    assert Recovery(said.append).again(Path("a.yaml"), FULL, experiment)
    assert len(said) == 2
    assert said[0].startswith("queue paused: the disk is full: ")
    assert "free some space" in said[0]
    assert said[1].startswith("the check passes again")


def test_a_wish_to_stop_ends_the_waiting(experiment: Experiment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trouble, "ROOM", 1 << 60)
    assert not Recovery(lambda text: STOP.request()).again(Path("a.yaml"), FULL, experiment)


def test_lost_credentials_pause_until_the_bucket_answers_again(experiment: Experiment, s3_credentials: None) -> None:
    """A server that has the credentials for expired, until the pause was announced."""
    renewed = threading.Event()

    class Server(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = LISTING if renewed.is_set() else EXPIRED
            self.send_response(200 if renewed.is_set() else 403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    storage = Storage(endpoint_url=f"http://127.0.0.1:{server.server_port}", allow_http=True)
    remote = experiment.model_copy(update={"data_root": "s3://b/data", "storage": storage})
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        renewed.set()

    try:
        with pytest.raises(StoreError) as met:
            Store(storage).probe("s3://b/data")
        assert Recovery(say).again(Path("a.yaml"), met.value, remote)
    finally:
        server.shutdown()
    assert "the credentials have expired" in said[0]
    assert "log in again" in said[0]
    wrong: Callable[[str], None] = said.append
    assert not Recovery(wrong).again(Path("a.yaml"), StoreError("cannot list s3://c: there is no such bucket"), remote)
