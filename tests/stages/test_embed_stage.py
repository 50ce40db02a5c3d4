"""The stage embed: what it stores beside the rows, in every form, and what it says of itself."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.pipeline import Done, plan_stage
from plmsae_cli.plm.alphabet import encode, pack
from plmsae_cli.runtime.embedding import forecast
from plmsae_cli.runtime.models import load_plm
from plmsae_cli.stages import common
from plmsae_cli.stages import embed as embed_stage
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.manifest import read_manifest, verify
from plmsae_cli.store.proteins import read_proteins
from plmsae_cli.store.tensorfile import TensorFile
from tests.stages.conftest import rows_of

Build = Callable[..., Experiment]
Go = Callable[..., Done]


def folder_of(experiment: Experiment, layer: int = 2) -> str:
    return Lineage(experiment, Store()).embed(layer).folder


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 2**-8), ("float16", 2**-11), ("float32", 0.0)])
def test_each_stored_type_is_the_models_row_rounded(build: Build, go: Go, dtype: str, error: float) -> None:
    exact, stored = build(), build(embed__dtype=dtype)
    for experiment in (exact, stored):
        go(experiment, ["embed"])
    for heldout in (False, True):
        theirs, ours = rows_of(folder_of(exact), heldout), rows_of(folder_of(stored), heldout)
        assert ours.dtype == getattr(torch, dtype)
        # Shards of other types have other sizes, so packs differ: a little rounding of float32 comes on top.
        assert float((ours.float() - theirs).abs().max()) <= (error + 1e-5) * float(theirs.abs().max())


def test_pooled_rows_are_the_means_of_the_stored_ones(build: Build, go: Go) -> None:
    experiment = build(embed__pooled=True, embed__layers=[1, 2], train__layer=2)
    go(experiment, ["embed"])
    store = Store()
    for layer in (1, 2):
        folder = folder_of(experiment, layer)
        assert verify(store, folder) == []
        table = read_proteins(store, join(folder, "proteins.parquet")).to_pylist()
        names = sorted(p.name for p in Path(folder, "pooled").iterdir())
        assert len(names) > 1
        means = torch.cat([TensorFile(store, join(folder, "pooled", name)).read("mean") for name in names])
        assert means.dtype == torch.float32
        rows = {split: rows_of(folder, split == "heldout") for split in ("train", "heldout")}
        expected = [
            rows[p["split"]][p["row_offset"] : p["row_offset"] + p["rows"]].double().mean(0).float() for p in table
        ]
        assert torch.equal(means, torch.stack(expected))


def test_pooled_is_another_artifact_and_the_others_keep_their_names(build: Build) -> None:
    assert folder_of(build(embed__pooled=True)) != folder_of(build())
    assert "pooled" not in build().embed.science()  # type: ignore[union-attr]


def test_windows_keep_every_residue_of_long_proteins(build: Build, go: Go) -> None:
    """Rows of a long protein against its windows as proteins of their own; the short ones as ever."""
    cut, whole = build(embed__max_length=24), build(embed__max_length=24, embed__long="windows")
    for experiment in (cut, whole):
        go(experiment, ["embed"])
    folder = folder_of(whole)
    manifest = read_manifest(Store(), folder)
    assert manifest is not None
    table = read_proteins(Store(), join(folder, "proteins.parquet")).to_pylist()
    long = [p for p in table if p["length"] > 24]
    assert manifest["counts"]["windowed"] == len(long) > 0
    assert manifest["counts"]["truncated"] == 0
    assert manifest["rows"] + manifest["heldout_rows"] == sum(p["length"] for p in table)
    assert all(p["rows"] == p["length"] == len(p["sequence"]) and not p["truncated"] for p in table)
    model = load_plm(whole.model.weights, Store())

    def embed(sequence: str) -> torch.Tensor:
        packed = pack([encode(sequence)])
        with torch.inference_mode():
            return model(packed.tokens_T, packed.documents, layers=[2]).hidden[2][1:-1]  # type: ignore[no-any-return]

    rows = {split: rows_of(folder, split == "heldout") for split in ("train", "heldout")}
    for protein in table:
        ours = rows[protein["split"]][protein["row_offset"] : protein["row_offset"] + protein["rows"]]
        length = protein["length"]
        if length <= 24:
            torch.testing.assert_close(ours, embed(protein["sequence"]), rtol=1e-4, atol=1e-5)
            continue
        count = 1 + -(-(length - 24) // 12)
        starts = [i * (length - 24) // (count - 1) for i in range(count)]
        windows = {s: embed(protein["sequence"][s : s + 24]) for s in starts}
        for residue in range(0, length, 5):
            nearest = min((s for s in starts if s <= residue < s + 24), key=lambda s: abs(residue - s - 11.5))
            torch.testing.assert_close(ours[residue], windows[nearest][residue - nearest], rtol=1e-4, atol=1e-5)


def test_the_manifest_says_what_computed_it_and_how_well(build: Build, go: Go) -> None:
    experiment = build(embed__layers=[2, 3], train__layer=2)
    go(experiment, ["embed"])
    inner, last = (read_manifest(Store(), folder_of(experiment, layer)) for layer in (2, 3))
    assert inner is not None
    assert last is not None
    for layer, made in ((2, inner), (3, last)):
        header = TensorFile(Store(), join(folder_of(experiment, layer), "shard-00000.safetensors")).metadata
        assert made["convention"] == header["convention"]
        assert made["convention"].endswith("last after final LayerNorm")
        assert made["final_layer_norm"] is (layer == 3) is (header["final_layer_norm"] == "true")
    manifest = inner
    assert manifest["kernel"] == {
        "attention": ["sdpa"],
        "batch_tokens": [4096],
        "compute": ["float32"],
        "kernels": ["eager"],
    }
    speed = manifest["speed"]
    assert 0 < speed["busy"] <= 1
    assert speed["padding"] == 0 == speed["waited"]
    assert speed["residues_per_second"] > 0


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_the_plan_foretells_bytes_and_objects(build: Build, go: Go, dtype: str) -> None:
    experiment = build(embed__pooled=True, embed__layers=[1, 2], embed__dtype=dtype, train__layer=2)
    plan = plan_stage("embed", experiment, Store())
    figures = plan.figures
    assert sum(made.bytes for made in plan.artifacts.values()) == figures["bytes"]
    go(experiment, ["embed"])
    files = [p for layer in (1, 2) for p in Path(folder_of(experiment, layer)).rglob("*") if p.is_file()]
    assert figures["objects"] == len(files)
    size = sum(p.stat().st_size for p in files)
    # Tables, statistics and headers come on top.
    assert figures["bytes"] < size < 1.2 * figures["bytes"] + 100_000 * figures["shards"]
    assert figures["hours"] >= 0
    assert "assumed" in figures["hours_from"]


def test_the_plan_has_what_a_bucket_and_gpus_cost(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embed_stage, "count_gpus", lambda launch: 3)
    monkeypatch.setattr(forecast, "forecast", lambda *_: {"hours": 0.5})
    prices = {"gpu_hour": 1e6, "tb_day": 1e6, "million_requests": 1e6}  # so high that cents are seen
    # A local folder in the place of a bucket: its plan alone is looked at.
    monkeypatch.setattr(common, "is_remote", lambda folder: True)
    figures = plan_stage("embed", build(price=prices), Store()).figures
    parts = math.ceil(figures["bytes"] / (16 << 20))
    assert figures["requests"] == 2 * figures["objects"] + parts == figures["usd_requests"]
    assert figures["usd_storage_a_day"] == round(figures["bytes"] / 1e6, 2) > 0
    assert figures["usd_gpus"] == 1.5e6
    monkeypatch.undo()
    local = plan_stage("embed", build(price=prices), Store()).figures
    assert {"requests", "usd_requests", "usd_gpus"}.isdisjoint(local), "neither a bucket nor a GPU"
    assert local["usd_storage_a_day"] == figures["usd_storage_a_day"]
