"""The store on Ceph's RADOS Gateway: a production S3 that checks signatures, conditions and parts, as moto does not."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plmsae_cli.config.experiment import Experiment, Storage
from plmsae_cli.executors.pipeline import run_experiment
from plmsae_cli.runtime.processes import free_port
from plmsae_cli.runtime.progress import PlainReporter
from plmsae_cli.store.fs import MissingError, Store, StoreError
from plmsae_cli.store.manifest import verify
from plmsae_cli.store.range_cache import CachingStore
from tests.conftest import S3Server

NEEDED = ("radosgw", "radosgw-admin", "ceph-mon", "ceph-osd", "ceph", "monmaptool", "ceph-authtool")
ABSENT = [name for name in NEEDED if shutil.which(name) is None]
pytestmark = [
    pytest.mark.rados,
    pytest.mark.slow,
    pytest.mark.skipif(bool(ABSENT), reason=f"RADOS Gateway is not installed: no {', '.join(ABSENT)}"),
]
DATA = np.random.default_rng(2).bytes(40 << 20)


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a gateway that knows one user."""
    folder = tmp_path_factory.mktemp("rados")
    port = free_port()
    script = Path(__file__).with_name("rados.sh")
    try:
        started = subprocess.run(
            [str(script), str(folder), str(port), "tester-key", "tester-secret"],
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert started.returncode == 0, started.stderr
        yield f"http://127.0.0.1:{port}"
    finally:
        for name in ("gateway", "osd", "mon"):
            with suppress(OSError, ValueError):
                os.kill(int((folder / f"{name}.pid").read_text()), signal.SIGKILL)


@pytest.fixture
def bucket(gateway: str, s3_credentials: None, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "tester-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "tester-secret")
    name = f"test-{secrets.token_hex(6)}"
    S3Server(gateway, name).client().create_bucket(Bucket=name)
    return f"s3://{name}", Storage(endpoint_url=gateway, allow_http=True)


def test_small_and_large_objects(bucket: Any) -> None:
    url, storage = bucket
    store = Store(storage)
    store.probe(url, write=True)
    record = store.write(f"{url}/folder/large.bin", [DATA], size=len(DATA))
    assert store.hash(f"{url}/folder/large.bin").xxh3 == record.xxh3
    buffer = bytearray(20 << 20)
    store.read_into(f"{url}/folder/large.bin", 12345, memoryview(buffer))
    assert buffer == DATA[12345 : 12345 + len(buffer)]
    store.write(f"{url}/folder/ö b.json", [b"{}"])
    assert store.list(f"{url}/folder") == {"large.bin": len(DATA), "ö b.json": 2}
    store.delete(f"{url}/folder/ö b.json")
    with pytest.raises(MissingError):
        store.read(f"{url}/folder/ö b.json")


def test_of_many_at_once_one_creates(bucket: Any) -> None:
    url, storage = bucket
    store = Store(storage)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: store.write_once(f"{url}/parts/a.json", b"%d" % i), range(8)))
    assert sum(won) == 1
    assert store.read(f"{url}/parts/a.json") == b"%d" % won.index(True)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("AWS_SECRET_ACCESS_KEY", "another", "the secret key is wrong"),
        ("AWS_ACCESS_KEY_ID", "nobody", "does not know the access key|permission denied"),
    ],
)
def test_signatures_are_checked(
    bucket: Any, monkeypatch: pytest.MonkeyPatch, name: str, value: str, words: str
) -> None:
    url, storage = bucket
    monkeypatch.setenv(name, value)
    with pytest.raises(StoreError, match=words):
        Store(storage).probe(url)


def test_an_object_replaced_while_it_is_cached_is_not_mixed(bucket: Any, tmp_path: Path) -> None:
    url, storage = bucket
    store = CachingStore(storage, str(tmp_path / "c"), 1 << 30)
    Store(storage).write(f"{url}/x", [DATA])
    buffer = bytearray(100)
    store.read_into(f"{url}/x", 0, memoryview(buffer))
    Store(storage).write(f"{url}/x", [DATA[::-1]])
    with pytest.raises(StoreError, match="replaced while it was read"):
        store.read_into(f"{url}/x", 100, memoryview(buffer))


def test_an_experiment(bucket: Any, tmp_path: Path, smoke_fasta: Path) -> None:
    url, storage = bucket
    experiment = Experiment.model_validate(
        {
            "name": "run",
            "root": str(tmp_path / "runs"),
            "data_root": f"{url}/data",
            "storage": storage.model_dump(),
            "launch": {"gpus": 0},
            "embed": {"fasta": str(smoke_fasta), "layers": [1], "holdout": 0.1, "shard": "300kB"},
            "shuffle": {},
            "optimize": {"chunk": "256kB", "block_rows": 64},
            "train": {"sae": {"k": 4, "expansion": 2}, "batch_tokens": 128, "tokens": 1280, "lr": 1e-3},
        }
    )
    run_experiment(experiment, experiment.stages(), PlainReporter())
    store = Store(storage)
    folders = {name.partition("/")[0] for name in store.list(f"{url}/data") if name.endswith("MANIFEST.json")}
    assert {folder.partition("-")[0] for folder in folders} == {"embed", "shuffle", "optimize"}
    assert [verify(store, f"{url}/data/{folder}") for folder in sorted(folders)] == [[], [], []]
