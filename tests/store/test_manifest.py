"""The commit protocol: what counts as done, what as damaged."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.config.errors import UserError
from plmsae_cli.store.fs import DamagedError, FileRecord, Store, StoreError, join
from plmsae_cli.store.manifest import (
    MANIFEST,
    Part,
    canonical_json,
    delete_artifact,
    done_tasks,
    read_manifest,
    read_parts,
    verify,
    write_manifest,
    write_part,
)


@dataclass(frozen=True)
class Place:
    store: Store
    folder: str

    def write(self, name: str, data: bytes) -> FileRecord:
        return self.store.write(join(self.folder, name), [data])

    def part(self, task: str, **contents: bytes) -> list[FileRecord]:
        records = [self.write(f"shards/{name}", data) for name, data in contents.items()]
        write_part(self.store, self.folder, task, records, {"rows": len(records)})
        return records

    def manifest(self, records: list[FileRecord], created: str = "now") -> None:
        prefix = len(self.folder) + 1
        files = [{"name": r.name[prefix:], "size": r.size, "xxh3": r.xxh3} for r in records]
        head = {"format": "f/1", "stage": "embed", "key": "k", "config": {}, "inputs": {}, "created": created}
        write_manifest(self.store, self.folder, head | {"files": files})


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "local":
        return Place(Store(), str(tmp_path / "embed-k"))
    server = request.getfixturevalue("s3")
    return Place(server.store(), server.url("embed-k"))


def test_parts_round_trip(place: Place) -> None:
    assert read_parts(place.store, place.folder) == {}
    assert done_tasks(place.store, place.folder) == set()
    first = place.part("embed-0", a=b"aa", b=b"")
    place.part("embed-1", c=b"c")
    parts = read_parts(place.store, place.folder)
    assert list(parts) == ["embed-0", "embed-1"]
    relative = [FileRecord("shards/a", 2, first[0].xxh3), FileRecord("shards/b", 0, first[1].xxh3)]
    assert parts["embed-0"] == Part("embed-0", relative, {"rows": 2})
    assert done_tasks(place.store, place.folder) == {"embed-0", "embed-1"}


@pytest.mark.parametrize("names", [read_parts, done_tasks])
def test_a_record_withdrawn_after_the_listing_is_absent(
    place: Place, monkeypatch: pytest.MonkeyPatch, names: Callable[[Store, str], Iterable[str]]
) -> None:
    for number in range(2):
        place.part(f"t-{number}")
    original = Store.list

    def then_withdrawn(self: Store, folder: str) -> dict[str, int]:
        found = original(self, folder)
        self.delete(join(place.folder, "parts/t-0.json"))
        return found

    monkeypatch.setattr(Store, "list", then_withdrawn)
    assert list(names(place.store, place.folder)) == ["t-1"]


def test_a_task_is_done_only_with_all_its_files(place: Place) -> None:
    place.part("embed-0", a=b"aa", b=b"b")
    place.part("embed-1", c=b"cc")
    place.part("embed-2", d=b"dd")
    place.store.delete(join(place.folder, "shards/b"))
    place.write("shards/c", b"c")
    assert done_tasks(place.store, place.folder) == {"embed-2"}
    place.write("parts/embed-2.json", b'{"task": "embed-2", "fil')
    assert done_tasks(place.store, place.folder) == set()
    with pytest.raises(DamagedError, match=r"parts/embed-2\.json is damaged") as caught:
        read_parts(place.store, place.folder)
    assert "delete it" in (caught.value.hint or "")
    # Doing the tasks again mends every kind of damage.
    place.part("embed-0", a=b"aa", b=b"b")
    place.part("embed-1", c=b"cc")
    place.part("embed-2", d=b"dd")
    assert done_tasks(place.store, place.folder) == {"embed-0", "embed-1", "embed-2"}


def test_the_first_complete_attempt_stands(place: Place) -> None:
    place.part("embed-0", first=b"1")
    place.part("embed-0", second=b"22")
    assert [f.name for f in read_parts(place.store, place.folder)["embed-0"].files] == ["shards/first"]
    place.store.delete(join(place.folder, "shards/first"))
    place.part("embed-0", third=b"333")
    assert [f.name for f in read_parts(place.store, place.folder)["embed-0"].files] == ["shards/third"]


def test_a_record_says_what_lies_there_after_an_attempt_that_rounds_differently(place: Place) -> None:
    """Another machine, taken for dead, ends after the task was done again: same names and sizes, other bytes."""
    place.part("embed-0", a=b"aa", b=b"bb")
    records = place.part("embed-0", a=b"aa", b=b"BB")
    place.manifest(records)
    assert [f.xxh3 for f in read_parts(place.store, place.folder)["embed-0"].files] == [r.xxh3 for r in records]
    assert verify(place.store, place.folder) == []
    # Of two that end at once the last to write counts, whoever declares it first.
    late = [place.write("shards/a", b"AA"), records[1]]
    place.part("embed-0", a=b"aa", b=b"BB")
    write_part(place.store, place.folder, "embed-0", late, {})
    assert [f.xxh3 for f in read_parts(place.store, place.folder)["embed-0"].files] == [r.xxh3 for r in records]


def test_of_two_that_finish_at_once_the_first_stands(place: Place) -> None:
    first = place.part("embed-0", a=b"aa")
    place.manifest(first, created="first")
    place.manifest(first, created="second")
    assert (read_manifest(place.store, place.folder) or {})["created"] == "first"
    for _ in range(20):
        place.store.delete(join(place.folder, MANIFEST))
        with ThreadPoolExecutor(3) as pool:
            list(pool.map(lambda number: place.manifest(first, created=f"by {number}"), range(3)))
    # One of other files, and one that is damaged, does not.
    place.manifest([place.write("shards/a", b"other")], created="third")
    assert (read_manifest(place.store, place.folder) or {})["created"] == "third"
    place.write(MANIFEST, b"{")
    place.write("shards/a", b"aa")
    place.manifest(first, created="fourth")
    assert (read_manifest(place.store, place.folder) or {})["created"] == "fourth"


def test_a_manifest_of_the_same_files_that_took_the_place_of_ours_is_no_damage(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both found a manifest of other files, and each writes its own over it."""
    old = [place.write("shards/a", b"other")]
    place.manifest(old, created="stale")
    files = [place.write("shards/a", b"aa")]
    original = Store.write

    def then_another(self: Store, path: str, *arguments: Any, **more: Any) -> FileRecord:
        record = original(self, path, *arguments, **more)
        monkeypatch.setattr(Store, "write", original)
        place.store.delete(join(place.folder, MANIFEST))
        place.manifest(files, created="theirs")
        return record

    monkeypatch.setattr(Store, "write", then_another)
    place.manifest(files, created="ours")
    assert (read_manifest(place.store, place.folder) or {})["created"] == "theirs"


@pytest.mark.parametrize("damage", ["gone", "replaced"])
def test_no_manifest_lists_a_file_that_is_not_there(place: Place, damage: str) -> None:
    records = place.part("embed-0", a=b"aa", b=b"bb")
    if damage == "gone":  # by `keep` or `clean` of another process
        place.store.delete(records[0].name)
    else:
        place.write("shards/a", b"another")
    with pytest.raises(StoreError, match=r"shards/a is not there as its task wrote it") as caught:
        place.manifest(records)
    assert "start again" in (caught.value.hint or "")
    assert read_manifest(place.store, place.folder) is None
    assert done_tasks(place.store, place.folder) == set(), "the next start makes it anew"
    place.manifest(place.part("embed-0", a=b"aa", b=b"bb"))
    assert verify(place.store, place.folder) == []


def test_records_and_files_that_a_list_does_not_have_yet_are_found_by_name(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = place.part("embed-0", a=b"aa") + place.part("embed-1", b=b"b")
    monkeypatch.setattr(Store, "list", lambda *_: {})
    assert read_parts(place.store, place.folder) == {}
    assert list(read_parts(place.store, place.folder, known=["embed-1", "embed-7"])) == ["embed-1"]
    place.manifest(records)
    assert verify(place.store, place.folder) == []


def test_done_tasks_lists_once(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    for i in range(5):
        place.part(f"t-{i}", **{f"f{i}": b"x"})
    listed = []
    original = Store.list

    def counting(self: Store, folder: str) -> dict[str, int]:
        listed.append(folder)
        return original(self, folder)

    monkeypatch.setattr(Store, "list", counting)
    monkeypatch.setattr(Store, "size", lambda *_: pytest.fail("a request for each file"))
    assert len(done_tasks(place.store, place.folder)) == 5
    assert listed == [place.folder]


def test_manifest_round_trip_is_canonical(place: Place) -> None:
    assert read_manifest(place.store, place.folder) is None
    place.manifest(place.part("embed-0", a=b"aa"))
    body = read_manifest(place.store, place.folder)
    assert body is not None
    assert (body["format"], body["stage"], body["files"][0]["name"]) == ("f/1", "embed", "shards/a")
    raw = place.store.read(join(place.folder, MANIFEST))
    assert raw == canonical_json(dict(reversed(body.items())))
    with pytest.raises(ValueError, match="JSON compliant"):
        canonical_json({"x": float("nan")})


def test_a_manifest_that_comes_back_different_is_removed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    records = place.part("embed-0", a=b"aa")
    monkeypatch.setattr(Store, "read", lambda *_: b"{}")
    with pytest.raises(StoreError, match="came back different"):
        place.manifest(records)
    monkeypatch.undo()
    assert not Path(place.folder, MANIFEST).exists() or place.folder.startswith("s3:")


def test_verify_names_every_damage(place: Place) -> None:
    assert verify(place.store, place.folder) == [f"{join(place.folder, MANIFEST)}: missing"]
    contents = {name: bytes(1000) for name in ("flipped", "short", "zeros", "gone", "fine", "x", "y")}
    contents |= {"zeros": b"1" * 1000, "x": b"x" * 1000, "y": b"y" * 1000}
    place.manifest(place.part("embed-0", **contents))
    place.write("shards/unknown", b"extra")
    assert verify(place.store, place.folder) == []
    place.write("shards/flipped", bytes(500) + b"\x01" + bytes(499))
    place.write("shards/short", bytes(999))
    place.write("shards/zeros", bytes(1000))
    place.write("shards/x", contents["y"])
    place.write("shards/y", contents["x"])
    place.store.delete(join(place.folder, "shards/gone"))
    problems = verify(place.store, place.folder)
    expected = {
        "flipped": "content differs",
        "short": "size differs, 1000 bytes recorded, 999 found",
        "zeros": "content differs",
        "gone": "missing",
        "x": "content differs",
        "y": "content differs",
    }
    assert len(problems) == len(expected)
    for name, words in expected.items():
        (line,) = [p for p in problems if p.startswith(join(place.folder, "shards", name) + ":")]
        assert words in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b'{"files": [', "Expecting value"),
        (b"\xff\xff\xff\xff", "decode"),
        (b"[]", "not a JSON object"),
        (b'{"format": "f/1"}', "`files`"),
        (b'{"files": 3}', "`files`"),
        (b'{"files": [{"name": "a"}]}', "`files`"),
    ],
)
def test_damaged_manifests_name_file_and_remedy(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read_manifest(Store(), str(tmp_path))
    assert f"{tmp_path}/{MANIFEST} is damaged" in caught.value.message
    assert words in caught.value.message
    assert "delete it" in (caught.value.hint or "")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../b", "~/x", "."])
def test_hostile_names_do_not_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    body: dict[str, Any] = {"files": [{"name": name, "size": 1, "xxh3": "0"}]}
    (tmp_path / MANIFEST).write_text(json.dumps(body))
    for call in (read_manifest, verify):
        with pytest.raises(DamagedError, match="not a name inside"):
            call(Store(), str(tmp_path))


def test_deletion_starts_with_the_manifest(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.manifest(place.part("embed-0", a=b"aa", b=b"b"))
    deleted = []
    original = Store.delete

    def recording(self: Store, path: str) -> None:
        deleted.append(path)
        original(self, path)

    monkeypatch.setattr(Store, "delete", recording)
    delete_artifact(place.store, place.folder)
    assert deleted[0] == join(place.folder, MANIFEST)
    assert place.store.list(place.folder) == {}
