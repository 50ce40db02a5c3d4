"""What all tests share: examples and numbers that repeat, a cache, a small disk, a real S3 server in this process."""

from __future__ import annotations

import functools
import os
import secrets
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings

from plmsae_cli.config.experiment import Storage
from plmsae_cli.plm.esm2 import ESM2, ESM2Config
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.store.fs import Store
from plmsae_cli.store.weights import save_model

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, which other tests' modules may do

# The same examples each time, as fast as the machine is: `--hypothesis-profile=default` looks for others.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("repeatable")


def pytest_runtest_setup() -> None:
    """What a test draws does not depend on those before it, which are others on every machine."""
    torch.manual_seed(0)


def random_esm2(folder: Path, num_layers: int = 3, d: int = 32, num_heads: int = 2, seed: int = 7) -> Path:
    """The folder, with weights of a tiny language model drawn at random."""
    config = ESM2Config(num_layers=num_layers, d=d, num_heads=num_heads)
    model = ESM2(config)
    model.init_weights(seed)
    save_model(Store(), str(folder), dict(model.state_dict()), asdict(config), {})
    return folder


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is kept for later is not looked for, nor left, in the home of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PLMSAE_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(autouse=True)
def _nobody_asks_to_stop() -> Iterator[None]:
    """A wish to stop, of which a process has one, ends with its test; signals are as they were."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    STOP.asked = False
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Traced and cut into graphs as on a GPU, but not handed to a compiler, which takes half a minute on a CPU."""
    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of so many MB, where this user may."""
    place = tmp_path / "disk"

    def mount(megabytes: int) -> Path:
        place.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("this user may not mount a tmpfs")
        return place

    yield mount
    if place.is_mount():
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@dataclass(frozen=True)
class S3Server:
    """A running S3 server with one empty bucket of this test's own."""

    endpoint_url: str
    bucket: str

    def storage(self) -> Storage:
        """The settings that reach the server (it speaks plain http)."""
        return Storage(endpoint_url=self.endpoint_url, allow_http=True)

    def store(self) -> Store:
        return Store(self.storage())

    def client(self) -> Any:
        """boto3's, which looks at the server past our code."""
        import boto3

        # A session of its own: that of the module would keep the credentials of its first use for all tests to come.
        return boto3.Session().client("s3", endpoint_url=self.endpoint_url, region_name="us-east-1")

    def url(self, *names: str) -> str:
        """`s3://bucket/name/...`"""
        return "/".join([f"s3://{self.bucket}", *names])


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """Address of a moto server that lives as long as the test session."""
    server_module = pytest.importorskip("moto.server")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        _write_conditionally(patch)
        server.start()
        _, port = server.get_host_and_port()
        yield f"http://127.0.0.1:{port}"
        server.stop()


def _write_conditionally(patch: pytest.MonkeyPatch) -> None:
    """One write after the other: between moto's look for an object and its writing, another thread may have written it, which
    S3 rules out for `If-None-Match`."""
    from moto.s3.responses import S3Response

    lock, put_object = threading.Lock(), S3Response.put_object

    def locked(response: Any) -> Any:
        with lock:
            return put_object(response)

    patch.setattr(S3Response, "put_object", locked)


@pytest.fixture
def s3_credentials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Credentials the server accepts in the environment, and nothing of the user's own."""
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_REGION"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing-secret")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-aws-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-aws-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("PLMSAE_CACHE", str(tmp_path / "plmsae-cache"))


@pytest.fixture
def s3(s3_endpoint: str, s3_credentials: None) -> S3Server:
    """An S3 server with a fresh bucket; credentials are in the environment."""
    server = S3Server(s3_endpoint, f"test-{secrets.token_hex(6)}")
    server.client().create_bucket(Bucket=server.bucket)
    return server
