"""The cache of ranges: fetched once however many read, true to the object, within its limit, whatever happens to its files."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plmsae_cli.store.fs import Store, StoreError
from plmsae_cli.store.range_cache import CachingStore
from plmsae_cli.store.s3 import S3Objects

DATA = np.random.default_rng(0).bytes(100_000)


@pytest.fixture
def url(s3: Any) -> str:
    s3.store().write(s3.url("x"), [DATA])
    return str(s3.url("x"))


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Ranges that came over the link."""
    found: list[tuple[int, int]] = []
    real = S3Objects.read_into

    def counted(self: S3Objects, path: str, start: int, buffer: memoryview, etag: str | None = None) -> None:
        found.append((start, buffer.nbytes))
        time.sleep(0.05)
        real(self, path, start, buffer, etag)

    monkeypatch.setattr(S3Objects, "read_into", counted)
    return found


def read(store: Store, url: str, start: int, length: int) -> bytes:
    buffer = bytearray(length)
    store.read_into(url, start, memoryview(buffer))
    return bytes(buffer)


def files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("??/*") if path.is_file()]


def test_a_range_is_fetched_once_by_all_threads_and_later_processes(
    s3: Any, url: str, tmp_path: Path, fetched: list[tuple[int, int]]
) -> None:
    store = CachingStore(s3.storage(), str(tmp_path / "c"), 1 << 20)
    with ThreadPoolExecutor(8) as pool:
        ranges = [(i % 4 * 1000, 900) for i in range(32)]
        found = list(pool.map(lambda r: read(store, url, *r), ranges))
    assert found == [DATA[start : start + length] for start, length in ranges]
    assert sorted(fetched) == [(i * 1000, 900) for i in range(4)]
    assert (store.hits, store.misses) == (28, 4)
    later = CachingStore(s3.storage(), str(tmp_path / "c"), 1 << 20)
    assert read(later, url, 2000, 900) == DATA[2000:2900]
    assert len(fetched) == 4
    assert read(later, url, 2000, 901) == DATA[2000:2901], "another length is another range"
    assert len(fetched) == 5


PROCESS = """
import sys
from plmsae_cli.config.experiment import Storage
from plmsae_cli.store.range_cache import CachingStore
store = CachingStore(Storage(endpoint_url=sys.argv[1], allow_http=True), sys.argv[3], 1 << 20)
for start in range(0, 90_000, 3000):
    store.read_into(sys.argv[2], start, memoryview(bytearray(3000)))
print(store.hits, store.misses)
"""


def test_two_processes_share_a_folder(s3: Any, url: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROCESS, s3.endpoint_url, url, str(tmp_path / "c")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]) for _ in "ab"]
    counts = [tuple(map(int, process.communicate()[0].split())) for process in both]
    assert sum(misses for _, misses in counts) == 30, counts
    assert sum(hits for hits, _ in counts) == 30


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty"])
def test_damaged_files_are_fetched_again(
    s3: Any, url: str, tmp_path: Path, fetched: list[tuple[int, int]], damage: str
) -> None:
    store = CachingStore(s3.storage(), str(tmp_path / "c"), 1 << 20)
    read(store, url, 0, 500)
    (file,) = files(tmp_path / "c")
    content = bytearray(file.read_bytes())
    content[77] ^= 1
    file.write_bytes({"cut": content[:100], "flipped": content, "empty": b""}[damage])
    assert read(store, url, 0, 500) == DATA[:500]
    assert len(fetched) == 2
    assert read(store, url, 0, 500) == DATA[:500]
    assert len(fetched) == 2


def test_the_limit_holds_and_what_is_there_stays(
    s3: Any, url: str, tmp_path: Path, fetched: list[tuple[int, int]]
) -> None:
    folder = tmp_path / "c"
    store = CachingStore(s3.storage(), str(folder), 5 * 1016)
    for _ in range(2):
        for start in range(0, 10_000, 1000):
            assert read(store, url, start, 1000) == DATA[start : start + 1000]
    assert sum(file.stat().st_size for file in files(folder)) == 5 * 1016
    assert len(fetched) == 15, "the second epoch finds the first five"
    old = time.time() - 1e5
    for file in files(folder)[:3]:  # as left by a run of long ago
        import os

        os.utime(file, (old, old))
    later = CachingStore(s3.storage(), str(folder), 5 * 1016)
    for start in range(20_000, 25_000, 1000):
        read(later, url, start, 1000)
    assert sum(file.stat().st_size for file in files(folder)) == 5 * 1016
    assert later.misses == 5
    for start in range(20_000, 23_000, 1000):
        read(later, url, start, 1000)
    assert later.hits == 3


def test_another_content_under_the_name_is_not_mixed(s3: Any, url: str, tmp_path: Path) -> None:
    store = CachingStore(s3.storage(), str(tmp_path / "c"), 1 << 20)
    assert read(store, url, 0, 10) == DATA[:10]
    s3.store().write(url, [DATA[::-1]])
    assert read(store, url, 0, 10) == DATA[:10], "known by its etag"
    with pytest.raises(StoreError, match="replaced while it was read"):
        read(store, url, 10, 10)
    assert read(CachingStore(s3.storage(), str(tmp_path / "c"), 1 << 20), url, 0, 10) == DATA[:-11:-1]


def test_a_folder_that_cannot_be_written_costs_only_speed(s3: Any, url: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    store = CachingStore(s3.storage(), str(tmp_path / "file" / "c"), 1 << 20)
    assert read(store, url, 5, 100) == read(store, url, 5, 100) == DATA[5:105]


def test_a_lock_that_cannot_be_had_costs_only_speed(s3: Any, url: str, tmp_path: Path) -> None:
    """Another user's, say, or the disk is full. A folder stands for it, which stops root too."""
    store = CachingStore(s3.storage(), str(tmp_path / "c"), 1 << 20)
    assert read(store, url, 0, 10) == DATA[:10]
    for stripe in range(1024):
        lock = tmp_path / "c" / f"fetch-{stripe}.lock"
        lock.unlink(missing_ok=True)
        lock.mkdir()
    assert read(store, url, 20, 30) == DATA[20:50]
    assert read(store, url, 0, 10) == DATA[:10]
    assert (store.hits, store.misses) == (1, 2)


def test_local_files_pass_by(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(DATA)
    store = CachingStore(None, str(tmp_path / "c"), 1 << 20)
    assert read(store, str(tmp_path / "x"), 5, 100) == DATA[5:105]
    assert not (tmp_path / "c").exists()


def test_threads_that_lack_different_ranges_do_not_wait_for_each_other(s3: Any, url: str, tmp_path: Path) -> None:
    store = CachingStore(s3.storage(), str(tmp_path / "c"), 1 << 20)
    read(store, url, 0, 1)
    gate = threading.Barrier(2, timeout=240)
    real = S3Objects.read_into

    def met(self: S3Objects, *arguments: Any) -> None:
        gate.wait()
        real(self, *arguments)

    with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
        patch.setattr(S3Objects, "read_into", met)
        assert list(pool.map(lambda start: read(store, url, start, 10), (10, 20))) == [DATA[10:20], DATA[20:30]]
