"""Files hashed beside their first read: what differs is named, and each file is read once for it."""

from __future__ import annotations

from pathlib import Path

import pytest

from plmsae_cli.store.checked import CheckedReads
from plmsae_cli.store.fs import DamagedError, FileRecord, Store


class Counting(Store):
    def __init__(self) -> None:
        super().__init__()
        self.hashed: list[str] = []

    def hash(self, path: str) -> FileRecord:
        self.hashed.append(Path(path).name)
        return super().hash(path)


def prepared(folder: Path) -> list[dict[str, object]]:
    files: list[dict[str, object]] = []
    for i in range(4):
        record = Store().write(str(folder / f"c{i}"), [bytes([i]) * 1000])
        files.append({"name": f"c{i}", "size": record.size, "xxh3": record.xxh3})
    return files


def touch(store: Store, folder: Path, index: int) -> bytes:
    buffer = bytearray(10)
    store.read_into(str(folder / f"c{index}"), 5, memoryview(buffer))
    return bytes(buffer)


def test_sound_files_are_hashed_once_and_shared_among_ranks(tmp_path: Path) -> None:
    files = prepared(tmp_path)
    hashed = []
    for rank in range(2):
        inner = Counting()
        store = CheckedReads(inner, str(tmp_path), files, rank, 2)
        for _ in range(3):
            assert [touch(store, tmp_path, i) for i in (0, 1, 2)] == [bytes([i]) * 10 for i in (0, 1, 2)]
        store.finish()
        hashed.append(inner.hashed)
    assert [sorted(names) for names in hashed] == [["c0", "c2"], ["c1"]], "c3 was never read"


@pytest.mark.parametrize("damage", ["flipped", "short", "zeros", "swapped"])
def test_damage_is_named(tmp_path: Path, damage: str) -> None:
    files = prepared(tmp_path)
    content = bytearray((tmp_path / "c2").read_bytes())
    content[900] ^= 4
    new = {"flipped": bytes(content), "short": bytes(content[:800]), "zeros": bytes(1000)}
    (tmp_path / "c2").write_bytes(new.get(damage) or (tmp_path / "c1").read_bytes())
    store = CheckedReads(Store(), str(tmp_path), files)
    touch(store, tmp_path, 0)
    touch(store, tmp_path, 2)
    with pytest.raises(DamagedError, match=r"/c2 (is damaged|has 800 bytes)") as error:
        store.finish()
    assert "MANIFEST.json" in str(error.value.hint)
    with pytest.raises(DamagedError):
        touch(store, tmp_path, 0)


def test_reading_goes_on_after_the_checks_were_waited_for(tmp_path: Path) -> None:
    files = prepared(tmp_path)
    (tmp_path / "c3").write_bytes(bytes(1000))
    store = CheckedReads(Store(), str(tmp_path), files)
    touch(store, tmp_path, 0)
    store.finish()
    touch(store, tmp_path, 3)
    with pytest.raises(DamagedError, match="/c3 is damaged"):
        store.finish()


def test_objects_in_s3_are_left_alone() -> None:
    files: list[dict[str, object]] = [{"name": "c0", "size": 1, "xxh3": ""}]
    assert CheckedReads(Store(), "s3://b/data", files)._expected == {}
