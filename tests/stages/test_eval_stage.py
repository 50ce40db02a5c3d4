"""eval: its figures are those of the raw held-out rows, its table points at real residues, its JSON is JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.evaluation import fidelity
from plmsae_cli.executors.pipeline import Done, plan_stage
from plmsae_cli.plm.alphabet import MASK, encode, pack
from plmsae_cli.plm.esm2 import ESM2, ESM2Config
from plmsae_cli.runtime.masked_scores import masks
from plmsae_cli.runtime.models import load_plm
from plmsae_cli.runtime.results import headline
from plmsae_cli.runtime.saved import load_sae_with_facts, open_blocks
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.proteins import read_proteins
from plmsae_cli.store.weights import save_model
from tests.stages.conftest import rows_of

Build = Callable[..., Experiment]
Go = Callable[..., Done]


def strict(path: Path) -> dict[str, Any]:
    """A file's JSON, in which NaN and Infinity are errors."""

    def refuse(token: str) -> None:
        raise AssertionError(f"{path} holds {token}")

    body: dict[str, Any] = json.loads(path.read_text(), parse_constant=refuse)
    return body


def test_figures_and_table_are_those_of_the_raw_rows(build: Build, go: Go) -> None:
    experiment = build(train__sae__expansion=16)  # 512 latents, some of which never fire
    run = go(experiment).run.path
    store, lineage = Store(), Lineage(experiment, Store())
    dataset = lineage.dataset().folder
    embedded = lineage.embed(2).folder
    x_RD = rows_of(embedded, heldout=True)
    training_RD = rows_of(embedded, heldout=False)
    saved = load_sae_with_facts(run)
    with torch.inference_mode():
        z_RN = saved.model.encode_dense(x_RD)
        trained_RN = saved.model.encode_dense(training_RD)
        xhat_RD = z_RN.double() @ saved.model.w_dec_ND.double() + saved.model.b_dec_D
    mean_D = training_RD.double().mean(0)

    metrics = strict(run / "eval" / "metrics.json")
    found = metrics["fidelity"]
    fvu = (x_RD - xhat_RD).square().sum() / (x_RD - mean_D).square().sum()
    assert found["fvu"] == pytest.approx(float(fvu), rel=1e-5)
    cosine = torch.cosine_similarity(x_RD.double(), xhat_RD, dim=1).mean()
    assert found["cosine"] == pytest.approx(float(cosine), rel=1e-6)
    assert found["l0_mean"] == pytest.approx(float((z_RN > 0).sum(1).double().mean()))
    assert (found["heldout_rows"], metrics["num_latents"], metrics["k"]) == (len(x_RD), 512, 4)
    maximum_N = trained_RN.amax(0)
    assert found["dead_share"] == pytest.approx(float((maximum_N == 0).double().mean()))
    assert 0 < found["dead_share"] < 1
    variance = training_RD.double().var(0, correction=0).sum()
    assert found["gamma"] == pytest.approx(float(mean_D.norm() / variance.sqrt()), rel=1e-6)
    assert headline(run)["fvu"] == found["fvu"]
    assert headline(run)["recovered_zero"] == found["loss"]["masked"]["recovered_zero"]

    table = pq.read_table(run / "eval" / "latents.parquet").to_pydict()
    assert table["latent"] == list(range(512))
    assert table["density"] == pytest.approx((z_RN > 0).double().mean(0).tolist())
    assert table["max"] == pytest.approx(maximum_N.tolist(), rel=1e-5)
    assert table["dead"] == (maximum_N == 0).tolist()
    firing_N = (z_RN > 0).sum(0)
    assert table["mean_active"] == pytest.approx((z_RN.double().sum(0) / firing_N.clamp(min=1)).tolist(), rel=1e-4)
    assert table["top_activation"] == pytest.approx(z_RN.amax(0).tolist(), rel=1e-5)
    proteins = read_proteins(store, join(dataset, "proteins.parquet"), split="heldout").to_pylist()
    by_id = {protein["id"]: protein for protein in proteins}
    shown = ("top_protein", "top_residue", "top_context", "top_context_offset")
    for latent in range(512):
        name, residue, context, offset = (table[column][latent] for column in shown)
        if not firing_N[latent]:
            assert (name, residue, context, offset) == (None,) * 4
            continue
        protein = by_id[name]
        place = residue - 1  # positions count from 1
        # The row of that residue reaches the maximum, and no row before it does.
        row = protein["row_offset"] + place
        assert z_RN[row, latent] == pytest.approx(float(z_RN[:, latent].max()), rel=1e-6)
        assert not (z_RN[:row, latent] > z_RN[row, latent]).any()
        sequence = protein["sequence"]
        assert context == sequence[max(0, place - 10) : place + 11]
        assert context[offset] == sequence[place]


def test_losses_are_those_of_the_first_held_out_proteins(build: Build, go: Go) -> None:
    experiment = build()
    run = go(experiment).run.path
    found = strict(run / "eval" / "metrics.json")["fidelity"]
    assert found["spliced_identity"] == "exact"
    assert found["loss"]["proteins"] == 4
    dataset = Lineage(experiment, Store()).dataset().folder
    sequences = read_proteins(Store(), join(dataset, "proteins.parquet"), split="heldout")["sequence"].to_pylist()[:4]
    plm = load_plm(experiment.model.weights)
    for side in ("masked", "unmasked"):
        total, residues = 0.0, 0
        for sequence in sequences:
            packed = pack([encode(sequence)])
            every = np.ones(len(sequence), dtype=bool)
            chosen = torch.from_numpy(masks(sequence, 0.15) if side == "masked" else every)
            inputs_T = packed.tokens_T.long()
            if side == "masked":
                inputs_T[1:-1][chosen] = MASK
            with torch.inference_mode():
                log_p = plm(inputs_T, packed.documents, logits=True).logits[1:-1].double().log_softmax(-1)
            truth = packed.tokens_T.long()[1:-1]
            total -= float(log_p[chosen].gather(1, truth[chosen, None]).sum())
            residues += int(chosen.sum())
        assert found["loss"][side]["residues"] == residues
        assert found["loss"][side]["ce"] == pytest.approx(total / residues, rel=1e-5)


def test_an_ablation_without_effect_leaves_valid_json_and_a_report(
    build: Build, go: Go, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fidelity._score

    def flat(*arguments: Any) -> fidelity.Sums:
        """As if the layer did not matter to the model: every variant has the original's loss."""
        sums = real(*arguments)
        return fidelity.Sums(sums.residues, dict.fromkeys(sums.ce, sums.ce["original"]), sums.kl)

    monkeypatch.setattr(fidelity, "_score", flat)
    run = go(build()).run.path
    loss = strict(run / "eval" / "metrics.json")["fidelity"]["loss"]
    assert loss["masked"]["ce_zero"] == loss["masked"]["ce"]
    assert "recovered_zero" not in loss["masked"]
    assert set(headline(run)) == {"fvu", "cosine", "l0_mean", "dead_share"}
    assert (run / "report" / "index.html").exists()


def test_options_changed_and_changed_back_are_scored_again(build: Build, go: Go) -> None:
    run = go(build()).run.path
    first = strict(run / "eval" / "metrics.json")
    assert set(go(build(eval__fidelity__mask_rate=0.3)).stages) == {"eval"}
    assert strict(run / "eval" / "metrics.json") != first
    # Only the newest scores are on record: older ones must not pass for done because their files are as long.
    assert len(list((run / "parts").glob("fidelity-*.json"))) == 1
    assert set(go(build()).stages) == {"eval"}
    assert strict(run / "eval" / "metrics.json") == first
    assert go(build()).stages == {}


def test_without_held_out_proteins_there_is_one_clear_error(build: Build, go: Go) -> None:
    with pytest.raises(UserError, match=r"of which .* has none") as caught:
        plan_stage("eval", build(embed__holdout=0.0), Store())
    assert "embed.holdout" in str(caught.value.hint)


def test_a_dataset_of_another_model_is_refused(build: Build, go: Go, tmp_path: Path) -> None:
    first = build()
    go(first, ["embed", "shuffle", "optimize"])
    dataset = Lineage(first, Store()).dataset().folder
    assert open_blocks(dataset).d == 32
    config = ESM2Config(num_layers=3, d=32, num_heads=2)
    other = ESM2(config)
    other.init_weights(8)
    save_model(Store(), str(tmp_path / "other"), dict(other.state_dict()), asdict(config), {})
    data = {"embed": None, "shuffle": None, "optimize": None, "train.data": dataset}
    elsewhere = build(name="elsewhere", model__weights=str(tmp_path / "other"), **data)
    with pytest.raises(UserError, match=r"model\.weights is other, but the dataset was embedded with weights"):
        go(elsewhere)
    go(build(name="apart", model__weights=str(tmp_path / "other"), eval__fidelity__loss_recovered=False, **data))
    right = go(build(name="right", **data)).run.path
    assert strict(right / "eval" / "metrics.json")["fidelity"]["spliced_identity"] == "exact"


@pytest.mark.parametrize("root", ["./runs", "runs//deep/", "runs"])
def test_roots_may_be_written_in_any_way(
    build: Build, go: Go, root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = build(root=root)
    assert set(go(experiment).stages) == {"embed", "shuffle", "optimize", "train", "eval"}
    assert go(experiment).stages == {}
