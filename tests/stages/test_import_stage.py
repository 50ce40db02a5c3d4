"""Imported activations through every stage: the same artifact that computing them would have made."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plmsae_cli.cli.listing import show_data
from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.pipeline import Done, plan_stage
from plmsae_cli.store.activations import ActivationShards, Statistics
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.manifest import delete_parts, read_manifest, verify
from plmsae_cli.store.proteins import read_proteins
from tests.stages.conftest import rows_of

Build = Callable[..., Experiment]
Go = Callable[..., Done]
D = 16


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PLMSAE_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def acts(tmp_path: Path) -> Path:
    """30,000 rows in three files."""
    folder = tmp_path / "acts"
    folder.mkdir()
    rows = np.random.default_rng(0).normal(size=(30_000, D)).astype(np.float32)
    for i, part in enumerate(np.split(rows, [7000, 21_000])):
        np.save(folder / f"part-{i}.npy", part)
    return folder


@pytest.fixture
def imported(build: Build, acts: Path) -> Build:
    """An experiment that imports `acts`, which no protein is known of."""

    def make(**changes: Any) -> Experiment:
        base: dict[str, Any] = {
            "embed": {
                "imported": {"path": str(acts)},
                "layers": [3],
                "holdout": 0.1,
                "dtype": "float32",
                "shard": "500kB",
            },
            "eval__fidelity__loss_recovered": False,
        }
        return build(**{**base, **changes})

    return make


def folder_of(experiment: Experiment, layer: int = 3) -> str:
    return Lineage(experiment, Store()).embed(layer).folder


def files_of(folder: str) -> list[Any]:
    manifest = read_manifest(Store(), folder)
    assert manifest is not None
    return sorted((f["name"], f["size"], f["xxh3"]) for f in manifest["files"] if not f["name"].startswith("parts/"))


def test_every_stage_runs_on_rows_of_unknown_proteins(
    imported: Build, go: Go, acts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    experiment = imported()
    done = go(experiment)
    folder, store = folder_of(experiment), Store()
    assert verify(store, folder) == []
    whole = torch.from_numpy(np.concatenate([np.load(f) for f in sorted(acts.iterdir())]))
    table = read_proteins(store, join(folder, "proteins.parquet")).to_pylist()
    assert {row["sequence"] for row in table} == {""}
    assert table[1]["id"] == "rows-256-511"
    assert table[1]["description"] == "a block of rows of unknown proteins"
    held_R = torch.from_numpy(np.repeat([row["split"] == "heldout" for row in table], [row["rows"] for row in table]))
    assert 0 < held_R.sum() < len(whole) / 2
    assert torch.equal(rows_of(folder, True), whole[held_R])
    assert torch.equal(rows_of(folder, False), whole[~held_R])
    statistics = Statistics.read(store, join(folder, "stats.safetensors"))
    torch.testing.assert_close(statistics.mean_D, whole[~held_R].double().mean(0), rtol=1e-12, atol=1e-12)
    # Any place of the dataset traces back to its row, so no row was lost or doubled on the way.
    dataset = Lineage(experiment, store).optimize(3).folder
    manifest = read_manifest(store, dataset)
    assert manifest is not None
    assert (manifest["weights"], manifest["fasta"], manifest["imported"]["format"]) == (None, None, "npy")
    assert manifest["row_sum"] == read_manifest(store, folder)["row_sum"]  # type: ignore[index]
    # No SAE explains noise with a few latents, but it explains some of it.
    metrics = (done.run.path / "eval" / "metrics.json").read_text()
    assert '"fvu"' in metrics
    assert "imported activations" in (done.run.path / "eval" / "model_card.md").read_text()
    assert show_data(Path(folder), as_json=False) == 0
    shown = capsys.readouterr().out
    assert f"imported: {acts} (npy)" in shown
    assert "layer: 3 of ?" in shown


def test_import_of_what_we_embedded_is_what_we_embedded(build: Build, go: Go, tmp_path: Path, fasta: Path) -> None:
    """Rows written out in FASTA order come back as the same shards, table and statistics, and the model may run on them."""
    ours = build(embed__layers=[2])
    go(ours, ["embed"])
    store, folder = Store(), folder_of(ours, 2)
    sides = {split: rows_of(folder, split == "heldout") for split in ("train", "heldout")}
    table = read_proteins(store, join(folder, "proteins.parquet")).to_pylist()
    order = [sides[p["split"]][p["row_offset"] : p["row_offset"] + p["rows"]] for p in table]
    (tmp_path / "acts").mkdir()
    np.save(tmp_path / "acts" / "2.npy", torch.cat(order).numpy())
    path = str(tmp_path / "acts" / "{layer}.npy")
    theirs = build(embed__imported={"path": path, "of_model": True}, embed__layers=[2], name="theirs")
    done = go(theirs)
    again = folder_of(theirs, 2)
    assert again != folder
    for heldout in (False, True):
        assert torch.equal(rows_of(again, heldout), rows_of(folder, heldout))
    assert read_proteins(store, join(again, "proteins.parquet")).to_pylist() == table
    one, two = (read_manifest(store, f) for f in (folder, again))
    assert one is not None
    assert two is not None
    for name in ("row_sum", "weights", "fasta", "rows", "heldout_rows", "num_layers"):
        assert one[name] == two[name]
    assert "recovered_zero" in (done.run.path / "eval" / "metrics.json").read_text()


def test_a_lost_shard_is_made_again_and_the_bytes_are_those_of_one_pass(imported: Build, go: Go) -> None:
    experiment = imported()
    go(experiment, ["embed"])
    folder, store = folder_of(experiment), Store()
    before = files_of(folder)
    delete_parts(store, folder, ["shard-00001", "finish"])
    store.delete(join(folder, "MANIFEST.json"))
    assert [t.id for t in plan_stage("embed", experiment, store).tasks] == ["shard-00001", "finish"]
    go(experiment, ["embed"])
    assert files_of(folder) == before
    assert plan_stage("embed", experiment, store).done


def test_workers_and_files_do_not_change_the_bytes(imported: Build, go: Go, acts: Path, tmp_path: Path) -> None:
    go(imported(), ["embed"])
    whole = np.concatenate([np.load(f) for f in sorted(acts.iterdir())])
    (tmp_path / "one.npy").write_bytes(b"")
    np.save(tmp_path / "one.npy", whole)
    other = imported(embed__imported={"path": str(tmp_path / "one.npy")}, launch={"workers": 2})
    go(other, ["embed"])
    same = [
        [file for file in files_of(folder_of(e)) if file[0].startswith(("shard", "held"))] for e in (imported(), other)
    ]
    assert len(same[0]) > 4
    assert same[0] == same[1]


def test_int8_is_calibrated_on_the_rows_themselves(imported: Build, go: Go) -> None:
    exact, coded = imported(), imported(embed__dtype="int8", price={"tb_day": 1e6})
    figures = plan_stage("embed", coded, Store()).figures
    for experiment in (exact, coded):
        go(experiment, ["embed"])
    files = [file for file in Path(folder_of(coded)).rglob("*") if file.is_file()]
    assert figures["objects"] == len(files)
    assert figures["usd_storage_a_day"] == round(figures["bytes"] / 1e6, 2)
    rows = ActivationShards(Store(), folder_of(coded)).read(0, 5000)
    error = (rows - ActivationShards(Store(), folder_of(exact)).read(0, 5000)).square().mean()
    assert error < 1e-3


def test_the_folder_is_named_by_content(imported: Build, acts: Path, tmp_path: Path) -> None:
    first = folder_of(imported())
    acts.rename(tmp_path / "elsewhere")
    assert folder_of(imported(embed__imported={"path": str(tmp_path / "elsewhere"), "format": "npy"})) == first
    np.save(tmp_path / "elsewhere" / "part-3.npy", np.ones((1, D), np.float32))
    assert folder_of(imported(embed__imported={"path": str(tmp_path / "elsewhere")})) != first


def test_layers_come_from_the_places_named_after_them(imported: Build, go: Go, tmp_path: Path) -> None:
    for layer in (3, 4):
        shard = tmp_path / f"layer_{layer}" / "shard_0"
        shard.mkdir(parents=True)
        torch.save(torch.full((600, D), float(layer)) + torch.arange(600)[:, None] / 600, shard / "activations.pt")
    path = str(tmp_path / "layer_{layer}")
    experiment = imported(embed__imported={"path": path}, embed__layers=[3, 4], train__layer=4)
    go(experiment, ["embed"])
    assert [int(rows_of(folder_of(experiment, layer), False)[0, 0]) for layer in (3, 4)] == [3, 4]


def test_what_does_not_fit_is_refused_in_the_plan(imported: Build, build: Build, tmp_path: Path, fasta: Path) -> None:
    plans: list[tuple[dict[str, Any], str]] = [
        ({"embed__fasta": str(fasta)}, r"has 30,000 rows, the 81 proteins of embed.fasta have .* residues"),
        ({"embed__imported__of_model": True, "embed__layers": [2]}, "has rows of width 16, .* has 32"),
        ({"embed__imported__path": str(tmp_path / "nowhere")}, "nowhere does not exist"),
    ]
    for changes, message in plans:
        with pytest.raises(UserError, match=message):
            plan_stage("embed", imported(**changes), Store())
    for axis, section in (
        ("contacts", {"structures": ["x.pdb"]}),
        ("steering", {}),
        ("structure", {"fasta": str(fasta)}),
    ):
        with pytest.raises(UserError, match="the model of imported activations is not known"):
            plan_stage("eval", imported(**{f"eval__{axis}": section}), Store())
    for options in ({"one_per": "cluster"}, {"describe": {}}):
        with pytest.raises(UserError, match="need sequences, and those of the imported activations are not known"):
            plan_stage("eval", imported(eval__features=options), Store())
    np.save(tmp_path / "3.npy", np.zeros((500, D), np.float32))
    np.save(tmp_path / "4.npy", np.zeros((501, D), np.float32))
    path = str(tmp_path / "{layer}.npy")
    with pytest.raises(UserError, match=r"4.npy has 501 rows of width 16, .*3.npy 500 of 16"):
        plan_stage("embed", imported(embed__imported={"path": path}, embed__layers=[3, 4], train__layer=3), Store())


@pytest.mark.parametrize(("changes", "message"), [
    ({"eval__fidelity__loss_recovered": True}, "the model of imported activations is not known"),
    ({"eval__fidelity__loss_recovered": True, "embed__imported__of_model": True}, "the proteins of imported"),
    ({"embed__layers": [3, 4], "train__layer": 3}, "imported.path names one place"),
    ({"embed__compile": True}, "embed.compile has no effect on imported activations"),
    ({"embed__max_length": 100}, "no effect on imported activations without fasta"),
    ({"embed__pooled": True}, "pooled: true needs the proteins"),
    ({"embed__imported__path": "s3://bucket/acts"}, "from a local disk"),
    ({"embed__imported": None}, "embed needs fasta"),
])  # fmt: skip
def test_senseless_combinations_are_refused(imported: Build, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        imported(**changes)


def test_a_dataset_of_unknown_model_is_refused_by_name(imported: Build, build: Build, go: Go) -> None:
    made = imported()
    go(made, ["embed", "shuffle", "optimize"])
    data = Lineage(made, Store()).optimize(3).folder
    later = build(embed=None, shuffle=None, optimize=None, train__data=data)
    with pytest.raises(UserError, match="was made from imported activations, whose model is not known"):
        plan_stage("eval", later, Store())
