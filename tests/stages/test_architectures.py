"""Every architecture through the stages: it trains, exports, loads, encodes raw activations, and is scored."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.config.sae import OPTIONS
from plmsae_cli.executors.pipeline import Done
from plmsae_cli.runtime.saved import load_sae_with_facts, open_blocks
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.task import Interrupted
from plmsae_cli.sae.architectures import ARCHITECTURES
from plmsae_cli.stages import train as train_stage
from plmsae_cli.store.activations import Statistics
from plmsae_cli.store.checkpoint import load_newest
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.training import loop

Build = Callable[..., Experiment]
Go = Callable[..., Done]

KINDS: dict[str, dict[str, Any]] = {
    "topk": {"k": 4, "k_start": 8},
    "multi_topk": {"k": 4},
    "matryoshka_topk": {"k": 4},
    "batch_topk": {"k": 4},
    "matryoshka_batch_topk": {"k": 4, "selection": "local"},
    "jumprelu": {"target_l0": 8, "bandwidth": 0.5},
    "gated": {"sparsity_coefficient": 1.0},
    "relu_l1": {"sparsity_coefficient": 1.0},
    "switch": {"k": 4, "num_experts": 4, "balance_coefficient": 0.1},
}


def of(build: Build, kind: str, **changes: Any) -> Experiment:
    sae = {"architecture": kind, "expansion": 2.0, **KINDS[kind]}
    return build(**{"train.sae": sae, "name": kind.replace("_", "-"), "eval.fidelity.loss_recovered": False, **changes})


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_options_of_the_configuration_are_those_of_the_constructors() -> None:
    assert list(OPTIONS) == list(ARCHITECTURES) == list(KINDS)
    for kind, model in ARCHITECTURES.items():
        accepted = set(inspect.signature(model).parameters) - {"d", "num_latents"}
        assert set(OPTIONS[kind]) == accepted, kind


def test_every_architecture_trains_exports_loads_and_is_scored(build: Build, go: Go) -> None:
    for kind in KINDS:
        experiment = of(build, kind)
        plan = train_stage.plan(experiment, Store())
        run = go(experiment).run.path
        metrics = lines(run)
        assert metrics[-1]["fvu"] < metrics[0]["fvu"], kind
        assert metrics[-1]["l0_std"] >= 0, kind

        saved = load_sae_with_facts(run)
        assert saved.facts["config"]["architecture"] == kind
        assert type(saved.model) is ARCHITECTURES[kind]
        assert sum(p.numel() for p in saved.model.parameters()) == plan.figures["parameters"]
        folder = Lineage(experiment, Store()).dataset().folder
        blocks = open_blocks(folder)
        raw_BD = torch.empty(300, blocks.d, dtype=blocks.dtype)
        blocks.read_into(0, raw_BD)
        mean_D, scale = Statistics.read(Store(), join(folder, "stats.safetensors")).normalisation()
        state = load_newest(run / "checkpoints")
        assert state is not None
        unfolded = ARCHITECTURES[kind](**{k: v for k, v in saved.facts["config"].items() if k != "architecture"})
        for name, tensor in unfolded.trained().items():
            tensor.copy_(state.tensors[f"model.{name}"])
        want_BD = unfolded.eval()((raw_BD.float() - mean_D) * scale) / scale + mean_D
        torch.testing.assert_close(saved.model(raw_BD.float()), want_BD, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(saved.model.w_dec_ND.norm(dim=1), torch.ones(saved.model.num_latents))
        dense_RN = saved.model.encode_dense(raw_BD.float())
        assert (dense_RN.amax(0) <= saved.model.maximum_N + 1e-4).all(), kind

        scores = json.loads((run / "eval" / "metrics.json").read_text())
        assert scores["architecture"] == kind
        assert scores["k"] == KINDS[kind].get("k")
        assert 0 < scores["fidelity"]["l0_mean"] <= saved.model.num_latents
        assert 0 < scores["fidelity"]["fvu"] < 1.5, kind
        assert (run / "report" / "index.html").exists()


@pytest.mark.parametrize("kind", ["batch_topk", "jumprelu"])
def test_a_stopped_and_continued_run_is_bit_equal(
    build: Build, go: Go, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """theta and its count of steps, thresholds and their warm-up come back."""
    whole = go(of(build, kind, name="whole"), ["embed", "shuffle", "optimize", "train"]).run.path
    real, count = loop.fault, 0

    def fault(point: str, **where: object) -> None:
        nonlocal count
        count += point == "train.step"
        if count == 7:
            STOP.request()
        real(point, **where)

    monkeypatch.setattr(loop, "fault", fault)
    with pytest.raises(Interrupted):
        go(of(build, kind, name="parts"), ["train"])
    STOP.asked = False
    parts = go(of(build, kind, name="parts"), ["train"]).run.path
    first, second = (load_newest(run / "checkpoints") for run in (whole, parts))
    assert first is not None
    assert second is not None
    assert first.tensors.keys() == second.tensors.keys()
    assert all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    ours, theirs = (load_sae_with_facts(run).model.state_dict() for run in (whole, parts))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    if kind == "batch_topk":
        assert ours["theta"] > 0


def test_options_that_do_not_fit_the_width_are_refused_before_anything_runs(build: Build) -> None:
    for options, part in (
        ({"architecture": "switch", "num_latents": 100, "k": 4, "num_experts": 8}, "100 latents do not split into 8"),
        ({"architecture": "switch", "num_latents": 64, "k": 9, "num_experts": 8}, "choose k from 1 to 8"),
        ({"num_latents": 64, "k": 4, "k_start": 65}, "choose k_start from 1 to 64"),
        ({"architecture": "matryoshka_batch_topk", "num_latents": 8, "k": 2}, "leave a group empty"),
        ({"architecture": "jumprelu", "num_latents": 64, "target_l0": 65}, "choose one up to 64"),
        ({"architecture": "gated", "expansion": 1e-3}, "less than one latent"),
    ):
        with pytest.raises(UserError, match=part):
            train_stage.plan(build(**{"train.sae": options}), Store())


def test_what_a_run_insists_on_and_cannot_have_is_refused_before_anything_runs(build: Build) -> None:
    wide = {"num_latents": 64, "k": 4}
    for options, part in (
        ({"train.sae": wide, "train.kernels": "fused", "train.optimizer": "signum"}, "it updates by adam"),
        ({"train.sae": {"architecture": "gated"}, "train.kernels": "fused"}, "architecture: gated has none"),
        ({"train.sae": wide, "train.parallel": "latents", "launch.ranks": 3, "train.batch_tokens": 300}, "64 latents"),
    ):
        with pytest.raises(UserError, match=part):
            train_stage.plan(build(**options), Store())
