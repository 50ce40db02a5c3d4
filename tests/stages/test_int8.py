"""int8 from the language model to the trained dictionary."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.evaluation.concepts.sources import open_sources
from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.evaluation.rows import Rows, encode_rows
from plmsae_cli.executors.pipeline import Done
from plmsae_cli.store.activations import ActivationShards, Statistics
from plmsae_cli.store.blocks import Blocks
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.manifest import read_manifest, verify
from plmsae_cli.store.permutation import Permutation
from plmsae_cli.store.proteins import read_proteins
from plmsae_cli.store.quantise import CALIBRATION, Quantiser
from plmsae_cli.training.litdata_stream import LitDataStream

Build = Callable[..., Experiment]
Go = Callable[..., Done]


@pytest.fixture
def both(build: Build, go: Go, tmp_path: Path) -> dict[str, Experiment]:
    """The same experiment on float32 and on int8 rows, through every stage."""
    made = {}
    for dtype in ("float32", "int8"):
        made[dtype] = build(name=dtype, embed__dtype=dtype, root=str(tmp_path / dtype))
        go(made[dtype])
    return made


def test_int8_through_every_stage(both: dict[str, Experiment]) -> None:
    store = Store()
    plain, coded = (Lineage(both[dtype], store) for dtype in ("float32", "int8"))
    assert plain.embed(2).key != coded.embed(2).key
    folder, dataset = coded.embed(2).folder, coded.optimize(2).folder
    truth = ActivationShards(store, plain.embed(2).folder).read(0, plain.scan.num_rows)

    # The frozen numbers are those of the training rows: there are fewer of them than would be sampled.
    quantiser = Quantiser.read(store, join(folder, CALIBRATION))
    assert quantiser.count == len(truth)
    torch.testing.assert_close(quantiser.mean_D, truth.mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(quantiser.deviation_D, truth.std(0, correction=0), rtol=1e-4, atol=1e-5)

    # Rows are d + 2 bytes in the shards and in the blocks, each where the bijection says, and what the formula makes of them.
    shards, blocks = ActivationShards(store, folder), Blocks(store, dataset)
    assert (shards.width, shards.d, blocks.width, blocks.d, blocks.dtype) == (34, 32, 34, 32, torch.int8)
    stored = torch.empty(len(truth), 34, dtype=torch.int8)
    shards.read_into(0, stored)
    assert torch.equal(stored, quantiser.encode(truth))
    places = torch.from_numpy(Permutation(len(truth), 3, domain="shuffle")(np.arange(len(truth))))
    shuffled = blocks.read(0, blocks.num_rows)
    assert torch.equal(shuffled[places], stored)
    decoded = blocks.decode(shuffled)[places]
    assert torch.equal(decoded, shards.read(0, len(truth)))
    assert (decoded - truth).square().sum() < 3e-4 * (truth - truth.mean(0)).square().sum()

    # Statistics are those of the rows as they are read.
    statistics = Statistics.read(store, join(dataset, "stats.safetensors"))
    torch.testing.assert_close(statistics.mean_D, decoded.double().mean(0), rtol=1e-9, atol=1e-9)
    assert verify(store, dataset) == []
    manifest = read_manifest(store, dataset)
    assert manifest is not None
    assert (manifest["dtype"], manifest["d"]) == ("int8", 32)

    # A dictionary trained on them is all but the one trained on float32.
    found = {
        dtype: json.loads((Path(run.root) / dtype / "eval" / "metrics.json").read_text())["fidelity"]
        for dtype, run in both.items()
    }
    assert found["int8"]["fvu"] == pytest.approx(found["float32"]["fvu"], rel=0.02)
    assert found["int8"]["heldout_rows"] == found["float32"]["heldout_rows"]
    figures = [json.loads((Path(run.root) / dtype / "sae" / "sae.json").read_text()) for dtype, run in both.items()]
    assert figures[0]["config"] == figures[1]["config"]


def test_evaluation_computes_the_rows_that_int8_stores(both: dict[str, Experiment]) -> None:
    scope = Scope(both["int8"], Store())
    table = read_proteins(scope.store, join(scope.dataset, "proteins.parquet"), split="heldout").to_pylist()
    rows = Rows(scope, "auto", lambda: None)
    computed = rows.of([protein["sequence"] for protein in table]).cpu()
    shards = ActivationShards(scope.store, scope.dataset, heldout=True)
    stored = shards.read(0, shards.stop)
    quantiser = Quantiser.read(scope.store, join(scope.dataset, CALIBRATION))
    levels_RD = (computed - quantiser.mean_D) / quantiser.deviation_D
    step_RD = quantiser.deviation_D * levels_RD.abs().amax(1, keepdim=True) / 127
    # Other packs round float32 otherwise, which now and then is the next of 127 levels.
    assert ((computed - stored).abs() <= 1.01 * step_RD).all()
    assert ((computed - stored).abs() <= 1e-5 * stored.abs().max()).float().mean() > 0.99
    with open_sources(scope, ["residual"], "auto", lambda: None) as (_, null):
        assert encode_rows(null.code, computed.to(null.rows.device)).acts_BK.isfinite().all()


def test_unmodified_litdata_reads_the_bytes(both: dict[str, Experiment]) -> None:
    litdata = pytest.importorskip("litdata")
    dataset = Lineage(both["int8"], Store()).optimize(2).folder
    blocks = Blocks(Store(), dataset)
    data = litdata.StreamingDataset(dataset, item_loader=litdata.streaming.item_loader.TokensLoader(block_size=34))
    assert len(data) == blocks.num_rows
    for row in (0, 1, 63, 64, blocks.num_rows - 1):
        assert torch.equal(data[row], blocks.read(row, row + 1)[0])
    with LitDataStream(blocks, 64, 32) as stream:
        for step in (0, 1, stream.steps_per_epoch - 1):
            assert torch.equal(stream.rows(step), blocks.read(32 * step, 32 * step + 32))


def test_calibration_is_the_same_for_any_workers_and_sampled_by_hash(build: Build, go: Go, tmp_path: Path) -> None:
    from plmsae_cli.store.kept_proteins import sampled_proteins

    one = build(embed__dtype="int8", root=str(tmp_path / "one"))
    three = build(embed__dtype="int8", root=str(tmp_path / "three"), launch__workers=3)
    for experiment in (one, three):
        go(experiment, ["embed"])
    files = [Path(Lineage(e, Store()).embed(2).folder) / CALIBRATION for e in (one, three)]
    assert files[0].read_bytes() == files[1].read_bytes()

    assert one.embed is not None
    lineage = Lineage(one, Store())
    scan, fasta = lineage.scan, lineage.fasta
    sets = []
    for rows in (1, 1000, 3000, scan.num_rows):
        batches = list(sampled_proteins(fasta, scan, one.embed, rows, 500))
        chosen = [sequence for batch in batches for sequence in batch]
        assert sum(map(len, chosen)) >= rows
        assert all(sum(map(len, batch)) >= 500 for batch in batches[:-1])
        sets.append(set(chosen))
    assert len(sets[0]) == 1
    assert sets[0] < sets[1] < sets[2] < sets[3]  # more rows only add proteins
    assert sum(map(len, chosen)) == scan.num_rows  # training proteins alone


def test_calibration_reads_long_proteins_in_windows_too(build: Build, go: Go, tmp_path: Path) -> None:
    """There are fewer rows than it samples: their mean and deviation are those of all windows' rows, as float32 stores them."""
    folders = {}
    for dtype in ("float32", "int8"):
        made = build(embed__dtype=dtype, embed__max_length=24, embed__long="windows", root=str(tmp_path / dtype))
        go(made, ["embed"])
        folders[dtype] = Lineage(made, Store()).embed(2).folder
    exact = Statistics.read(Store(), join(folders["float32"], "stats.safetensors"))
    frozen = Quantiser.read(Store(), join(folders["int8"], CALIBRATION))
    assert frozen.count == exact.count
    torch.testing.assert_close(frozen.mean_D, exact.mean_D.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(frozen.deviation_D, exact.variance_D.sqrt().float(), rtol=1e-4, atol=1e-5)
