"""Every operation of Store, on a local folder and on a real S3 server: the same calls, the same answers."""

from __future__ import annotations

import errno
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.config.errors import UserError
from plmsae_cli.store.fs import DamagedError, FileRecord, MissingError, Store, StoreError, is_remote, join

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Place:
    store: Store
    folder: str


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        return Place(Store(), str(tmp_path / "root"))
    server = request.getfixturevalue("s3")
    return Place(server.store(), server.url("root"))


def random_bytes(size: int) -> bytes:
    return np.random.default_rng(size).bytes(size)


@pytest.mark.parametrize("size", [0, 1, 5_000, 7 << 20])
def test_written_bytes_are_read_back_and_recorded(place: Place, size: int) -> None:
    data = random_bytes(size)
    path = join(place.folder, "a", "b c%20ü.bin")
    record = place.store.write(path, [data[: size // 3], b"", memoryview(data)[size // 3 :]], size=size)
    assert record == FileRecord(path, size, xxhash.xxh3_128(data).hexdigest())
    assert place.store.read(path) == data
    assert place.store.size(path) == size
    assert place.store.hash(path) == record
    assert place.store.exists(path)
    assert place.store.local(path).read_bytes() == data


@pytest.mark.parametrize("new", [b"longer than it was", b"x"])
@pytest.mark.parametrize("when", ["before it is opened", "after"])
def test_a_file_replaced_while_it_is_read_is_the_old_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: bytes, when: str
) -> None:
    path, other = tmp_path / "record.json", tmp_path / "other"
    path.write_bytes(b"as it was")
    other.write_bytes(new)
    real = os.open

    def opened(name: str, *arguments: int) -> int:
        monkeypatch.undo()
        if when == "before it is opened":
            os.replace(other, path)
            return real(name, *arguments)
        descriptor = real(name, *arguments)
        os.replace(other, path)
        return descriptor

    monkeypatch.setattr(os, "open", opened)
    assert Store().read(str(path)) == (b"as it was" if when == "after" else new)
    assert Store().read(str(path)) == new


def test_a_file_system_without_hard_links_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As exFAT, or a drive in the cloud."""

    def refused(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refused)
    with pytest.raises(StoreError, match="its file system has no hard links"):
        Store().write_once(str(tmp_path / "plan.json"), b"{}")
    assert not list(tmp_path.iterdir())


def test_ranges(place: Place) -> None:
    data = random_bytes(12 << 20)  # on S3 several parallel requests
    path = join(place.folder, "x")
    place.store.write(path, [data])
    for start, stop in [(0, 1), (5, 11 << 20), (0, 12 << 20), ((12 << 20) - 1, 12 << 20), (7, 7)]:
        assert place.store.read(path, start, stop - start) == data[start:stop]
        buffer = np.zeros(stop - start, np.uint8)
        place.store.read_into(path, start, buffer.data)
        assert buffer.tobytes() == data[start:stop]
    assert place.store.read(path, 12_000_000) == data[12_000_000:]


def test_read_into_takes_buffers_of_any_type_and_shape(place: Place) -> None:
    data = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    path = join(place.folder, "x")
    place.store.write(path, [data.data, data[:0].data])
    out = np.empty((3, 4), np.float32)
    place.store.read_into(path, 48, out.data)
    assert np.array_equal(out, data[1])
    place.store.read_into(path, 48, out[:0].data)


def test_multipart_from_a_reused_buffer(place: Place) -> None:
    staging = bytearray(3_000_000)
    expected = xxhash.xxh3_128()

    def chunks() -> Iterator[memoryview]:
        for i in range(12):  # 36 MB: three parts
            staging[:] = bytes([i]) * len(staging)
            expected.update(staging)
            yield memoryview(staging)

    path = join(place.folder, "large")
    record = place.store.write(path, chunks())
    assert (record.size, record.xxh3) == (36_000_000, expected.hexdigest())
    assert place.store.hash(path) == record


def test_write_replaces(place: Place) -> None:
    path = join(place.folder, "x")
    place.store.write(path, [b"old and longer"])
    place.store.write(path, [b"new"])
    assert place.store.read(path) == b"new"
    assert place.store.list(place.folder) == {"x": 3}


@pytest.mark.parametrize("sent_mib", [1, 40])  # on S3: before anything is sent, and between parts
def test_failing_producer_leaves_the_old_content(place: Place, sent_mib: int) -> None:
    path = join(place.folder, "x")
    place.store.write(path, [b"old"])

    def chunks() -> Iterator[memoryview]:
        yield memoryview(b"n" * (sent_mib << 20))
        raise UserError("the input is bad", "mend it")

    with pytest.raises(UserError, match="the input is bad") as caught:
        place.store.write(path, chunks())
    assert caught.value.hint == "mend it"
    assert place.store.read(path) == b"old"
    assert place.store.list(place.folder) == {"x": 3}


def test_absent_files(place: Place) -> None:
    path = join(place.folder, "absent")
    assert not place.store.exists(path)
    assert place.store.list(path) == {}
    place.store.delete(path)
    for call in (place.store.size, place.store.read, place.store.local, place.store.hash):
        with pytest.raises(FileNotFoundError) as caught:
            call(path)
        assert isinstance(caught.value, UserError)
        assert path in str(caught.value)
    with pytest.raises(MissingError):
        place.store.read_into(path, 0, memoryview(bytearray(3)))


def test_short_files_are_named_with_the_range(place: Place) -> None:
    path = join(place.folder, "x")
    place.store.write(path, [b"0123456789"])
    for start, length in [(0, 11), (8, 3), (40, 2)]:
        with pytest.raises(DamagedError) as caught:
            place.store.read(path, start, length)
        assert path in caught.value.message
        with pytest.raises(DamagedError, match="short"):
            place.store.read_into(path, start, memoryview(bytearray(length)))


def test_write_once_has_one_winner(place: Place) -> None:
    path = join(place.folder, "locks", "one")
    place.store.exists(path)
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: place.store.write_once(path, b"%d" % i), range(8)))
    assert sum(won) == 1
    assert place.store.read(path) == b"%d" % won.index(True)
    assert not place.store.write_once(path, b"late")
    assert place.store.list(join(place.folder, "locks")) == {"one": 1}


def test_list_is_recursive_and_relative(place: Place) -> None:
    for name in ("a", "b/c", "b/d/e.json"):
        place.store.write(join(place.folder, name), [name.encode()])
    place.store.write(join(place.folder + "-sibling", "x"), [b"x"])
    expected = {"a": 1, "b/c": 3, "b/d/e.json": 10}
    assert place.store.list(place.folder) == expected
    assert place.store.list(place.folder + "/") == expected
    assert place.store.list(join(place.folder, "b")) == {"c": 3, "d/e.json": 10}
    assert not place.store.exists(join(place.folder, "b"))
    place.store.delete(join(place.folder, "b/c"))
    assert place.store.list(place.folder) == {"a": 1, "b/d/e.json": 10}


def test_list_leaves_nothing_out_past_a_thousand(place: Place) -> None:
    names = [f"n{i:04}" for i in range(1_005)]
    with ThreadPoolExecutor(4) as pool:
        created = pool.map(lambda name: place.store.write_once(join(place.folder, name), b"12"), names)
        assert all(created)
    assert place.store.list(place.folder) == dict.fromkeys(names, 2)


def _read_in_child(store: Store, path: str) -> bytes:
    return store.read(path)


def test_store_goes_to_spawned_workers(place: Place) -> None:
    path = join(place.folder, "x")
    place.store.write(path, [b"content"])
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        assert pool.submit(_read_in_child, place.store, path).result(60) == b"content"


def test_probe_accepts_what_works(place: Place) -> None:
    place.store.probe(join(place.folder, "not", "yet"), write=True)
    assert place.store.list(place.folder) == {}


def test_join() -> None:
    assert join("s3://b", "x", "y/z") == "s3://b/x/y/z"
    assert join("s3://b/k/", "x") == "s3://b/k/x"
    assert join("a", "x") == "a/x"
    assert join("/", "x") == "/x"
    assert join("", "x") == "x"
    assert is_remote("s3://b/k")
    assert not is_remote("b/s3://k")
    for name in ("../x", "a/../../x", "/etc/passwd", "", "a//b", "a/", ".", "~/x"):
        with pytest.raises(StoreError, match="not a name inside"):
            join("folder", name)


def test_other_schemes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StoreError, match="gs:// is not supported"):
        Store().write("gs://bucket/x", [b""])
    assert not list(tmp_path.iterdir())


@given(sizes=st.lists(st.sampled_from([0, 1, 65_535, 65_536, 5_000_000]), max_size=8))
@settings(deadline=None, max_examples=30)
def test_any_mixture_of_buffers_from_one_reused_buffer(sizes: list[int]) -> None:
    data = random_bytes(sum(sizes))
    staging = bytearray(5_000_000)

    def chunks() -> Iterator[memoryview]:
        place = 0
        for size in sizes:
            staging[:size] = data[place : place + size]
            yield memoryview(staging)[:size]
            staging[:size] = bytes(size)
            place += size

    with TemporaryDirectory() as folder:
        record = Store().write(join(folder, "x"), chunks(), size=len(data))
        assert Path(folder, "x").read_bytes() == data
    assert (record.size, record.xxh3) == (len(data), xxhash.xxh3_128(data).hexdigest())


# Local only


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    store = Store()
    assert store.write("~/deep/x", [b"12"]).name == "~/deep/x"
    assert (tmp_path / "deep" / "x").read_bytes() == b"12"
    assert store.list("~/deep") == {"x": 2}
    assert store.local("~/deep/x") == tmp_path / "deep" / "x"
    assert store.read("~/deep/x") == b"12"


WRITE = """
import sys
from plmsae_cli.store.fs import Store
Store().write(sys.argv[1], [b"new", b" content"])
"""


@pytest.mark.parametrize(("point", "content"), [("before", b"old"), ("after", b"new content")])
@pytest.mark.parametrize("old", [True, False])
def test_kill_around_the_rename(tmp_path: Path, point: str, content: bytes, old: bool) -> None:
    path = tmp_path / "x"
    if old:
        path.write_bytes(b"old")
    env = os.environ | {"PLMSAE_FAULT": f"kill:store.write.{point}-rename", "PYTHONPATH": str(ROOT)}
    child = subprocess.run([sys.executable, "-c", WRITE, str(path)], env=env, capture_output=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    if content == b"old" and not old:
        assert Store().list(str(tmp_path)) == {}
        assert not path.exists()
    else:
        assert path.read_bytes() == content
        assert Store().list(str(tmp_path)) == {"x": len(content)}
    # What a dead writer left does not stand in the way of the next.
    Store().write(str(path), [b"later"])
    assert path.read_bytes() == b"later"


@pytest.mark.parametrize("announced", [True, False])
def test_full_disk_names_the_bytes_and_keeps_the_old(tmp_path: Path, announced: bool) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")
    size = 9_000_000
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    # The limit on a file's size stops write(2) half-way, as a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, old_limit[1]))
    try:
        with pytest.raises(StoreError) as caught:
            Store().write(str(path), [bytes(3_000_000)] * 3, size=size if announced else None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
    needed = f"{size} bytes needed" if announced else "at least 6000000 bytes needed"
    assert f"cannot write {path}" in caught.value.message
    assert needed in caught.value.message
    assert " free on its file system" in caught.value.message
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path: Path) -> None:
    tmp_path.chmod(0o555)
    try:
        with pytest.raises(StoreError, match=r"cannot write .*Permission denied"):
            Store().write(str(tmp_path / "x"), [b"x"])
        with pytest.raises(StoreError, match="cannot be written by this user"):
            Store().probe(str(tmp_path / "deep" / "er"), write=True)
        Store().probe(str(tmp_path))
    finally:
        tmp_path.chmod(0o755)


def test_a_file_in_the_way_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    with pytest.raises(StoreError, match="cannot be a folder"):
        Store().probe(str(tmp_path / "x" / "y"))
    with pytest.raises(StoreError, match=r"cannot write .*/x/y/z"):
        Store().write(str(tmp_path / "x" / "y" / "z"), [b""])
    with pytest.raises(StoreError, match="cannot write"):
        Store().write(str(tmp_path), [b""])


def test_many_small_buffers_exceed_one_system_call(tmp_path: Path) -> None:
    pieces = [b"%05d" % i for i in range(5_000)]
    Store().write(str(tmp_path / "x"), iter(pieces))
    assert (tmp_path / "x").read_bytes() == b"".join(pieces)
