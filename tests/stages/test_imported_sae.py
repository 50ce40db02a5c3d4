"""train.imported: another project's dictionary becomes the run's, and is scored as one of ours."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.testing import assert_close

from plmsae_cli import load_sae
from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.executors.pipeline import Done, plan_stage
from plmsae_cli.runtime.run_folder import RunDiffers
from plmsae_cli.runtime.saved import load_sae_with_facts, open_blocks
from plmsae_cli.store.fs import Store
from plmsae_cli.store.lineage import Lineage

from .conftest import rows_of

Build = Callable[..., Experiment]
Go = Callable[..., Done]
D, N = 32, 40


def save(folder: Path, d: int = D, seed: int = 0, **trainer: Any) -> dict[str, torch.Tensor]:
    """dictionary_learning's AutoEncoder with random weights, and its settings if there are any."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        "encoder.weight": torch.randn(N, d, generator=generator),
        "encoder.bias": torch.randn(N, generator=generator),
        "decoder.weight": torch.randn(d, N, generator=generator),
        "bias": torch.randn(d, generator=generator),
    }
    folder.mkdir(exist_ok=True)
    torch.save(state, folder / "ae.pt")
    if trainer:
        (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoder", **trainer}}))
    return state


def test_it_is_scored_as_one_of_ours(build: Build, go: Go, tmp_path: Path, weights: str) -> None:
    state = save(tmp_path / "theirs")
    options = {"path": str(tmp_path / "theirs"), "weights": weights, "layer": 2}
    experiment = build(train={"imported": options})
    done = go(experiment)
    assert set(done.stages) == {"embed", "shuffle", "optimize", "train", "eval"}
    run, dataset = done.run.path, Lineage(experiment, Store()).dataset().folder

    def latents(x: torch.Tensor) -> torch.Tensor:
        """By its own formula, times the norms that leave the decoder's rows."""
        z = ((x - state["bias"]) @ state["encoder.weight"].T + state["encoder.bias"]).relu()
        return z * state["decoder.weight"].norm(dim=0)

    def reconstruction(x: torch.Tensor) -> torch.Tensor:
        return (latents(x) / state["decoder.weight"].norm(dim=0)) @ state["decoder.weight"].T + state["bias"]

    heldout = rows_of(dataset, heldout=True)
    blocks = open_blocks(dataset)
    rows = torch.empty(blocks.num_rows, D)
    blocks.read_into(0, rows)
    saved = load_sae_with_facts(run)
    assert_close(load_sae(run).encode_dense(heldout), latents(heldout), rtol=1e-4, atol=1e-4)
    assert_close(saved.model.maximum_N, latents(rows).amax(0), rtol=1e-4, atol=1e-4)
    assert saved.facts["imported"]["format"] == "dictionary_learning"
    assert saved.facts["layer"] == 2
    # The figures of the evaluation are those of the formula.
    fidelity = json.loads((run / "eval" / "metrics.json").read_text())["fidelity"]
    error = (heldout - reconstruction(heldout)).double().square().sum()
    mean_D = rows.double().mean(0)
    assert fidelity["fvu"] == pytest.approx(float(error / (heldout.double() - mean_D).square().sum()), rel=1e-3)
    assert fidelity["l0_mean"] == pytest.approx(float((latents(heldout) > 0).double().sum(1).mean()), rel=1e-4)
    assert "(dictionary_learning)" in (run / "eval" / "model_card.md").read_text()
    assert "imported from" in (run / "report" / "index.html").read_text()
    assert go(experiment).stages == {}
    save(tmp_path / "theirs", seed=1)  # another dictionary under the same name is another run
    with pytest.raises(RunDiffers):
        go(experiment)


@pytest.mark.parametrize(("trainer", "active"), [({}, 64), ({"dict_class": "AutoEncoderTopK", "k": 3}, 3)])
def test_axes_foretell_its_width_before_and_after_it_is_the_runs(
    build: Build, go: Go, tmp_path: Path, weights: str, trainer: dict[str, Any], active: int
) -> None:
    state = save(tmp_path / "theirs", **trainer)
    if trainer:
        named = {"b_dec": state.pop("bias"), "k": torch.tensor(active), "threshold": torch.tensor(-1.0)}
        torch.save(state | named, tmp_path / "theirs" / "ae.pt")
    options = {"path": str(tmp_path / "theirs"), "weights": weights, "layer": 2}
    experiment = build(train={"imported": options}, eval={"features": {}, "fidelity": {"loss_recovered": False}})
    assert Scope(experiment, Store()).shape() == (D, N, active)
    assert plan_stage("eval", experiment, Store()).figures["features, latents"] == N
    if trainer:
        go(experiment.model_copy(update={"eval": None}))
        assert Scope(experiment, Store()).shape() == (D, N, active)


def test_what_does_not_fit_the_dataset_is_refused(build: Build, tmp_path: Path, weights: str) -> None:
    def refused(reason: str, **options: Any) -> None:
        experiment = build(train={"imported": {"path": str(tmp_path / "theirs"), **options}})
        with pytest.raises(UserError, match=reason):
            plan_stage("train", experiment, Store())

    save(tmp_path / "theirs")
    refused("does not say of which model and layer", norm_factor=2.0)
    refused("does not say of which layer", weights=weights)
    refused("is of layer 3, the dataset of layer 2", weights=weights, layer=3)
    refused("is of esm2_t6_8M_UR50D, the dataset of", weights="esm2_t6_8M_UR50D", layer=2)
    save(tmp_path / "theirs", lm_name=weights, layer=1)
    refused("is of layer 1, the dataset of layer 2")
    plan = plan_stage(
        "train", build(train={"imported": {"path": str(tmp_path / "theirs"), "layer": 2}}), Store()
    )  # what the user says counts
    assert plan.figures["latents"] == N
    save(tmp_path / "theirs", d=48, lm_name=weights, layer=2)
    refused("takes activations of width 48, the dataset's have 32")
    (tmp_path / "theirs" / "ae.pt").unlink()
    refused("there is no dictionary at")


@pytest.mark.parametrize(
    ("name", "value"), [("sae", {"k": 4}), ("saes", [{"k": 4}]), ("lr", 1e-3), ("tokens", 1000), ("seed", 3)]
)
def test_it_is_not_trained(build: Build, name: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=f"{name} has no effect on train.imported"):
        build(train={"imported": {"path": "theirs"}, name: value})


def test_it_is_not_swept(build: Build) -> None:
    with pytest.raises(ValidationError, match="nothing to sweep"):
        build(train={"imported": {"path": "theirs"}}, sweep={"grid": {"train.layer": [2]}})
