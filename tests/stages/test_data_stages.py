"""embed, shuffle, optimize: every row once, in its place, whatever ran it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors import worker
from plmsae_cli.executors.pipeline import Done, plan_stage
from plmsae_cli.plm.alphabet import encode, pack
from plmsae_cli.runtime.models import load_plm
from plmsae_cli.store import passes
from plmsae_cli.store.activations import Statistics
from plmsae_cli.store.blocks import Blocks
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.manifest import read_manifest, verify
from plmsae_cli.store.permutation import Permutation
from plmsae_cli.store.proteins import locate_rows, read_proteins
from tests.stages.conftest import rows_of

Build = Callable[..., Experiment]
Go = Callable[..., Done]
DATA = ["embed", "shuffle", "optimize"]


def test_embedding_is_the_model_residue_by_residue(build: Build, go: Go) -> None:
    experiment = build(embed__layers=[1, 3], train__layer=3)
    go(experiment, ["embed"])
    store, lineage = Store(), Lineage(experiment, Store())
    model = load_plm(experiment.model.weights, store)
    for layer in (1, 3):
        folder = lineage.embed(layer).folder
        assert verify(store, folder) == []
        for side in ("train", "heldout"):
            table = read_proteins(store, join(folder, "proteins.parquet"), split=side)
            rows = rows_of(folder, side == "heldout")
            assert len(rows) == sum(table["rows"].to_pylist())
            for protein in table.to_pylist():
                packed = pack([encode(protein["sequence"])])
                with torch.inference_mode():
                    hidden = model(packed.tokens_T, packed.documents, layers=[layer]).hidden[layer]
                ours = rows[protein["row_offset"] : protein["row_offset"] + protein["rows"]]
                torch.testing.assert_close(ours, hidden[1:-1], rtol=1e-4, atol=1e-5)


def test_statistics_are_those_of_the_training_rows(build: Build, go: Go) -> None:
    experiment = build()
    go(experiment, ["embed"])
    folder = Lineage(experiment, Store()).embed(2).folder
    rows = rows_of(folder, False).double()
    statistics = Statistics.read(Store(), join(folder, "stats.safetensors"))
    assert statistics.count == len(rows)
    torch.testing.assert_close(statistics.mean_D, rows.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(statistics.variance_D, rows.var(0, correction=0), rtol=1e-10, atol=1e-12)


def test_every_row_is_where_the_bijection_says_and_can_be_traced_back(build: Build, go: Go) -> None:
    experiment = build()
    go(experiment, DATA)
    store, lineage = Store(), Lineage(experiment, Store())
    rows = rows_of(lineage.embed(2).folder, False)
    folder = lineage.optimize(2).folder
    blocks = Blocks(store, folder)
    placed = torch.empty_like(rows)
    blocks.read_into(0, placed)
    pi = Permutation(len(rows), 3, domain="shuffle")
    places = pi(np.arange(len(rows)))
    assert torch.equal(placed[places], rows)

    # Every row of every block, back to its protein and residue: embedding that protein anew gives the row.
    model = load_plm(experiment.model.weights, store)
    table = read_proteins(store, join(folder, "proteins.parquet"), split="train")
    protein, residue = locate_rows(table, pi.inverse(np.arange(len(rows))))
    for p, sequence in enumerate(table["sequence"].to_pylist()):
        packed = pack([encode(sequence)])
        with torch.inference_mode():
            hidden = model(packed.tokens_T, packed.documents, layers=[2]).hidden[2]
        of_p = np.flatnonzero(protein == p)
        assert sorted(residue[of_p]) == list(range(len(sequence)))
        torch.testing.assert_close(placed[of_p], hidden[1 + residue[of_p]], rtol=1e-4, atol=1e-5)


def content(folder: str) -> dict[str, str]:
    """Hashes of the data files: part records and manifests hold times and are left out."""
    names = [p for p in Path(folder).rglob("*") if p.is_file() and p.suffix != ".json"]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(names)}


def test_one_two_and_five_workers_write_the_same_bytes(build: Build, go: Go, tmp_path: Path) -> None:
    lineages = []
    for workers in (1, 2, 5):
        experiment = build(root=str(tmp_path / f"{workers}"), launch__workers=workers)
        go(experiment, DATA)
        lineages.append(Lineage(experiment, Store()))
    for stage in DATA:
        of_one, *of_more = (content(getattr(lineage, stage)(2).folder) for lineage in lineages)
        assert len(of_one) > 1
        assert all(made == of_one for made in of_more)


def test_a_finish_finds_the_records_that_a_list_does_not_have_yet(
    build: Build, go: Go, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a network disk, a moment after other machines have written them."""
    real = Store.list
    monkeypatch.setattr(Store, "list", lambda self, at: {} if at.endswith("/parts") else real(self, at))
    experiment = build()
    go(experiment, DATA)
    for stage in DATA:
        folder = getattr(Lineage(experiment, Store()), stage)(2).folder
        manifest = read_manifest(Store(), folder)
        assert manifest is not None
        assert set(content(folder)) == {f["name"] for f in manifest["files"]} - {"index.json"}


def test_data_that_are_deleted_while_their_manifest_is_written_are_not_finished(
    build: Build, go: Go, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = build()
    folder = Lineage(experiment, Store()).embed(2).folder

    def deleted(point: str, **_: object) -> None:
        if point == "embed.finish.written":
            Store().delete(join(folder, "parts", "shard-00001.json"))

    monkeypatch.setattr(worker, "fault", deleted)
    with pytest.raises(UserError, match=r"has no record of shard-00001 any more") as caught:
        go(experiment, ["embed"])
    assert "start again" in (caught.value.hint or "")
    assert read_manifest(Store(), folder) is None
    monkeypatch.undo()
    go(experiment, ["embed"])
    assert verify(Store(), folder) == []


def test_memory_decides_the_tasks_and_not_the_blocks(build: Build, go: Go, tmp_path: Path) -> None:
    small = build(root=str(tmp_path / "small"), shuffle__memory="64kB")
    large = build(root=str(tmp_path / "large"), shuffle__memory="64MB")
    plans = [plan_stage("shuffle", e, Store()) for e in (small, large)]
    assert len(plans[0].tasks) > 10 > len(plans[1].tasks)
    for experiment in (small, large):
        go(experiment, DATA)
    folders = [Lineage(e, Store()).optimize(2).folder for e in (small, large)]
    assert content(folders[0]) == content(folders[1])


def test_small_data_are_divided_alike_for_any_number_of_workers(
    build: Build, go: Go, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = build(root=str(tmp_path / "whole"), shuffle__memory="64MB")
    go(whole, DATA)
    monkeypatch.setattr(passes, "LOCAL_TASK", 40_000)
    split = [build(root=str(tmp_path / "split"), shuffle__memory="64MB", launch__workers=n) for n in (1, 5)]
    for stage in ("shuffle", "optimize"):
        one, five = (plan_stage(stage, e, Store()).tasks for e in split)
        assert [t.id for t in one] == [t.id for t in five]
        assert len(one) > 4
        assert all(16_000_000 < t.resources.memory < 18_000_000 for t in one if t.id != "finish"), (
            "a quarter, and its rows"
        )
    go(split[0], DATA)
    before, after = (Lineage(e, Store()) for e in (whole, split[0]))
    maps = [len(list(Path(lineage.shuffle(2).folder).glob("map-*"))) for lineage in (before, after)]
    assert maps[0] == 1 < maps[1]
    assert before.optimize(2).key == after.optimize(2).key
    assert content(before.optimize(2).folder) == content(after.optimize(2).folder)
    done = plan_stage("shuffle", whole, Store())
    assert done.done, "what was made undivided is not made again"
    assert done.figures["layer-2"]["maps"] == 1


def test_a_middle_pass_runs_on_workers_and_gives_the_same_blocks(build: Build, go: Go, tmp_path: Path) -> None:
    large = build(root=str(tmp_path / "large"), shuffle__memory="64MB")
    tiny = build(root=str(tmp_path / "tiny"), shuffle__memory="8kB", launch__workers=2)
    plan = plan_stage("shuffle", tiny, Store())
    assert plan.figures["layer-2"]["passes"] == 3
    assert plan.figures["layer-2"]["bytes_temporary"] > 0
    for experiment in (large, tiny):
        go(experiment, DATA)
    lineages = [Lineage(e, Store()) for e in (large, tiny)]
    assert content(lineages[0].optimize(2).folder) == content(lineages[1].optimize(2).folder)
    shuffled = Path(lineages[1].shuffle(2).folder)
    assert not list(shuffled.glob("map-*"))  # freed when the middle pass was through
    assert verify(Store(), str(shuffled)) == []
    assert plan_stage("shuffle", tiny, Store()).done


def test_a_second_start_does_nothing(build: Build, go: Go) -> None:
    experiment = build()
    assert set(go(experiment).stages) == {"embed", "shuffle", "optimize", "train", "eval"}
    assert go(experiment).stages == {}


def test_experiments_that_differ_in_the_sae_share_the_data(build: Build, go: Go) -> None:
    go(build())
    other = build(name="other", train__sae__k=2)
    assert set(go(other).stages) == {"train", "eval"}


def test_a_freed_artifact_is_not_rebuilt_unless_wanted(build: Build, go: Go) -> None:
    experiment = build()
    go(experiment, DATA)
    lineage = Lineage(experiment, Store())
    (Path(lineage.embed(2).folder) / "MANIFEST.json").unlink()
    (Path(lineage.shuffle(2).folder) / "MANIFEST.json").unlink()
    assert set(go(experiment).stages) == {"train", "eval"}


def test_later_starts_obey_the_first_plan(build: Build, go: Go) -> None:
    experiment = build()
    before = plan_stage("embed", experiment, Store())
    folder = before.artifacts["layer-2"].folder
    Store().write_once(join(folder, "plan.json"), b'{"ranges": [[0, 41], [41, 81]]}')
    shards = [t.id for t in plan_stage("embed", experiment, Store()).tasks if t.id.startswith("shard")]
    assert shards == ["shard-00000", "shard-00001"]
    assert len(before.tasks) != 4
    go(experiment, ["embed"])
    manifest = read_manifest(Store(), folder)
    assert manifest is not None
    assert manifest["rows"] == manifest["counts"]["residues"] - manifest["heldout_rows"]


def test_names_and_places_are_not_in_the_key_and_content_is(build: Build, tmp_path: Path, fasta: Path) -> None:
    key = Lineage(build(), Store()).optimize(2).key
    renamed = tmp_path / "renamed.fa"
    renamed.write_bytes(fasta.read_bytes())
    same = build(name="x", root=str(tmp_path / "y"), embed__fasta=str(renamed), embed__shard="1MB")
    assert Lineage(same, Store()).optimize(2).key == key
    renamed.write_bytes(fasta.read_bytes() + b">one more\nMKV\n")
    assert Lineage(same, Store()).optimize(2).key != key
    assert Lineage(build(shuffle__seed=4), Store()).optimize(2).key != key
