"""verify, clean, keep and the `ls` of one dataset, as users meet them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.stages.common import effort_figures
from plmsae_cli.store import housekeeping
from plmsae_cli.store.fs import Store
from plmsae_cli.store.housekeeping import Leaving
from plmsae_cli.store.manifest import write_manifest
from plmsae_cli.store.passes import Effort

Plmsae = Callable[..., Any]
Write = Callable[..., Path]


def test_a_damaged_shard_is_named_and_its_remedy_makes_it_again(plmsae: Plmsae, write: Write, tmp_path: Path) -> None:
    path = write(data=tmp_path / "data")
    assert plmsae("run", path).code == 0
    sound = plmsae("verify", path)
    assert (sound.code, sound.out.count(": sound")) == (0, 4)  # three artifacts and the run
    (chunk,) = (tmp_path / "data").glob("optimize-*/chunk-0-1.bin")
    before = chunk.read_bytes()
    chunk.write_bytes(before[:100] + bytes([before[100] ^ 1]) + before[101:])
    for target in (path, tmp_path / "data", chunk.parent):
        damaged = plmsae("verify", target)
        assert damaged.code == 1
        assert f"{chunk}: content differs" in damaged.out
    (body,) = [v for v in json.loads(plmsae("verify", path, "--json").out)["verified"] if v["damaged"]]
    task = body["damaged"][0]["task"]
    assert task.startswith("reduce-")
    same_task = {f["name"] for f in json.loads((chunk.parent / "parts" / f"{task}.json").read_text())["files"]}
    # What the remedy says.
    chunk.unlink()
    (chunk.parent / "MANIFEST.json").unlink()
    begun = {p: p.stat().st_mtime_ns for p in chunk.parent.glob("chunk-*.bin") if p.name not in same_task}
    assert plmsae("run", path).code == 0
    assert chunk.read_bytes() == before
    assert begun
    assert {p: p.stat().st_mtime_ns for p in begun} == begun  # what other tasks made was left as it is
    assert plmsae("verify", path).code == 0


def test_a_damaged_checkpoint_is_named_and_is_no_reason_to_begin_anew(
    plmsae: Plmsae, write: Write, tmp_path: Path
) -> None:
    path = write(data=tmp_path / "data")
    assert plmsae("run", path).code == 0
    newest = sorted((tmp_path / "runs").rglob("rank-0.safetensors"))[-1]
    newest.write_bytes(newest.read_bytes()[:-1] + b"x")
    damaged = plmsae("verify", tmp_path / "runs")
    assert damaged.code == 1
    assert f"{newest}: content differs" in damaged.out
    assert "checkpoint before it" in damaged.out


def test_verify_of_what_is_not_there(plmsae: Plmsae, write: Write, tmp_path: Path) -> None:
    for target in (tmp_path / "nowhere", write(data=tmp_path / "data"), tmp_path):
        missed = plmsae("verify", target)
        assert missed.code == 2
        assert "hint: " in missed.err


def test_clean_lists_and_deletes_only_when_told(plmsae: Plmsae, write: Write, tmp_path: Path) -> None:
    root = tmp_path / "runs"
    assert plmsae("run", write(data=root / "data")).code == 0
    assert json.loads(plmsae("clean", root, "--older", "0", "--unused", "--json").out)["found"] == []
    (dataset,) = root.rglob("optimize-*")
    stray = dataset / "chunk-0-99.bin"
    stray.write_bytes(b"x" * 10)
    os.utime(stray, (1, 1))
    listed = plmsae("clean", root)
    assert str(stray) in listed.out
    assert "--yes" in listed.err
    assert stray.exists()
    assert plmsae("clean", root, "--yes").code == 0
    assert not stray.exists()
    assert plmsae("verify", root).code == 0


def test_used_data_are_known_from_anywhere_by_any_name_of_the_root(
    plmsae: Plmsae, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert plmsae("run", write(root="runs", data="runs/data")).code == 0
    (tmp_path / "linked").symlink_to("runs")
    (tmp_path / "elsewhere").mkdir()
    for where, root in ((tmp_path, tmp_path / "runs"), (tmp_path, "linked"), (tmp_path / "elsewhere", "../runs")):
        monkeypatch.chdir(where)
        assert json.loads(plmsae("clean", root, "--older", "0", "--unused", "--json").out)["found"] == []
        assert all(data["used_by"] for data in json.loads(plmsae("ls", root, "--json").out)["data"])
    # A run that lies elsewhere and is linked to counts, and one whose dataset is named in train.data.
    monkeypatch.chdir(tmp_path)
    (run,) = (path.parent for path in (tmp_path / "runs").glob("*/artifacts.json"))
    run.rename(tmp_path / "elsewhere" / "run")
    run.symlink_to(tmp_path / "elsewhere" / "run")
    assert json.loads(plmsae("clean", "--older", "0", "--unused", "--json").out)["found"] == []
    (run / "artifacts.json").write_text("{")
    damaged = plmsae("clean", "--older", "0", "--unused")
    assert damaged.code == 2
    assert "artifacts.json is damaged" in damaged.err


def test_clean_leaves_what_a_run_begins_to_use_after_it_was_listed(
    plmsae: Plmsae, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / "data" / f"embed-{number:016x}" for number in range(2)]
    head = {"format": "f", "stage": "embed", "key": "k", "config": {}, "inputs": {}, "created": 1.0, "files": []}
    for folder in folders:
        write_manifest(Store(), str(folder), head)
        os.utime(folder / "MANIFEST.json", (1, 1))
    for name in ("before", "late"):
        (tmp_path / name).mkdir()
    (tmp_path / "before" / "artifacts.json").write_text("{}")
    real = housekeeping.leavings

    def listed(*arguments: Any) -> Iterator[Leaving]:
        yield from real(*arguments)
        pointer = {"embed": {"folder": str(folders[1]), "key": "k", "rows": 1}}
        (tmp_path / "late" / "artifacts.json").write_text(json.dumps(pointer))

    monkeypatch.setattr(housekeeping, "leavings", listed)
    cleaned = plmsae("clean", tmp_path, "--older", "0", "--unused", "--yes")
    assert cleaned.code == 0
    assert f"kept {folders[1]}: a run has begun to use it" in cleaned.err
    assert "deleted 1 thing(s)" in cleaned.err
    assert [folder.exists() for folder in folders] == [False, True]


def test_unused_is_refused_where_no_run_says_what_is_used(plmsae: Plmsae, write: Write, tmp_path: Path) -> None:
    assert plmsae("run", write(data=tmp_path / "data")).code == 0
    refused = plmsae("clean", tmp_path / "data", "--older", "0", "--unused", "--yes")
    assert refused.code == 2
    assert "holds no runs" in refused.err
    assert len(list((tmp_path / "data").rglob("MANIFEST.json"))) == 3


def test_a_run_on_a_named_dataset_points_to_it(plmsae: Plmsae, write: Write, tmp_path: Path) -> None:
    path = write(data=tmp_path / "data")
    assert plmsae("run", path).code == 0
    (dataset,) = (tmp_path / "data").glob("optimize-*")
    sets = [f"train.data={dataset}", "embed=null", "shuffle=null", "optimize=null", "name=other"]
    assert plmsae("train", path, *(word for one in sets for word in ("--set", one))).code == 0
    pointers = json.loads((tmp_path / "runs" / "other" / "artifacts.json").read_text())
    assert pointers["optimize"]["folder"] == str(dataset)
    assert pointers["optimize"]["rows"] == json.loads((dataset / "MANIFEST.json").read_text())["rows"]


def test_ls_of_a_damaged_manifest_names_it(plmsae: Plmsae, write: Write, tmp_path: Path) -> None:
    assert plmsae("run", write(data=tmp_path / "data")).code == 0
    (manifest,) = (tmp_path / "data").glob("optimize-*/MANIFEST.json")
    manifest.write_text("{")
    shown = plmsae("ls", tmp_path)
    assert shown.code == 0
    assert f"{manifest} is damaged" in shown.err
    assert "Traceback" not in shown.err
    found = plmsae("verify", tmp_path / "data")
    assert found.code == 1
    assert f"{manifest}: not the record" in found.out
    assert found.out.count("sound") == 2


def test_keep_frees_what_the_dataset_was_made_from_and_nothing_makes_it_again(
    plmsae: Plmsae, write: Write, tmp_path: Path
) -> None:
    path = write(data=tmp_path / "data")
    wanted = ("--set", "keep.activations=false", "--set", "keep.buckets=false")
    assert plmsae("run", path, *wanted).code == 0
    left = {p.name.split("-")[0]: sorted(f.name for f in p.iterdir()) for p in (tmp_path / "data").iterdir()}
    assert left["embed"] == left["shuffle"] == ["FREED.json"]
    assert "MANIFEST.json" in left["optimize"]
    again = json.loads(plmsae("run", path, *wanted, "--json").out)
    assert again["queue"][0]["state"] == "skipped"
    shown = plmsae("ls", tmp_path / "data")
    assert shown.out.count("freed") == 2


def test_ls_of_a_dataset_says_what_it_is(plmsae: Plmsae, write: Write, tmp_path: Path) -> None:
    path = write(data=tmp_path / "data")
    assert plmsae("run", path).code == 0
    (dataset,) = (tmp_path / "data").glob("optimize-*")
    shown = plmsae("ls", dataset).out
    manifest = json.loads((dataset / "MANIFEST.json").read_text())
    for words in (
        f"{manifest['rows']:,}",
        "chunks: ",
        "float32, 32 dimensions",
        "layer: 2 of 3",
        "seed: 3",
        "proteins: ",
    ):
        assert words in shown, words
    body = json.loads(plmsae("ls", dataset, "--json").out)
    assert (body["rows"], body["chunks"], body["dtype"]) == (
        manifest["rows"], len(list(dataset.glob("chunk-*"))), "float32",
    )  # fmt: skip


def test_the_dry_run_has_the_plan(plmsae: Plmsae, write: Write, tmp_path: Path) -> None:
    path = write(data=tmp_path / "data")
    shown = plmsae("optimize", path, "--with-inputs", "--dry-run", "--json")
    plans = {
        plan["stage"]: plan["figures"]["layer-2"] for plan in json.loads(shown.out)["plans"] if plan["stage"] != "embed"
    }
    rows = plans["shuffle"]["rows"]
    assert plans["shuffle"]["bytes_read"] == rows * 128
    assert plans["shuffle"]["bytes_written"] == plans["optimize"]["bytes_read"] == rows * 136
    assert plans["shuffle"]["passes"] == 2
    assert "assumed" in plans["shuffle"]["bytes_a_second"]
    assert "requests" not in plans["shuffle"]
    assert plmsae("shuffle", path, "--with-inputs").code == 0
    after = json.loads(plmsae("optimize", path, "--with-inputs", "--dry-run", "--json").out)["plans"]
    figures = {plan["stage"]: plan["figures"]["layer-2"] for plan in after if plan["stage"] != "embed"}
    assert figures["shuffle"]["memory_measured"] > 0
    assert "measured" in figures["optimize"]["bytes_a_second"]


def test_seconds_and_dollars_follow_from_speed_and_prices() -> None:
    sections = {
        "embed": {"fasta": "x", "layers": [0]},
        "launch": {"io_speed": "2GB"},
        "price": {"million_requests": 0.4, "tb_day": 20.0},
    }
    effort = Effort(1, 1, bytes_read=10**12, bytes_written=4 * 10**12, requests=5_000_000)
    found = effort_figures(effort, Experiment.model_validate(sections), "s3://bucket/x", measured=5e6)
    assert found["predicted_seconds"] == 2000.0
    assert found["bytes_a_second"] == "2,000 MB each way, launch.io_speed"
    assert (found["requests"], found["usd_requests"], found["usd_storage_a_day"]) == (5_000_000, 2.0, 80.0)
