"""train, kind plm, architecture unet: ranks, resuming, the clock and the race, and a result that embed reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.pipeline import Done, plan_stage
from plmsae_cli.plm.alphabet import AMINO_ACIDS, encode, pack
from plmsae_cli.plm.unet import UNet
from plmsae_cli.runtime.leaderboard import leaderboard
from plmsae_cli.runtime.models import load_plm
from plmsae_cli.runtime.run_folder import RunDiffers
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.task import Interrupted
from plmsae_cli.store.activations import ActivationShards
from plmsae_cli.store.checkpoint import Restored, load_newest
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.manifest import read_manifest
from plmsae_cli.store.proteins import read_proteins
from plmsae_cli.training import loop

Go = Callable[..., Done]
Unet = Callable[..., Experiment]
CLOCK = {"tokens_per_second", "loader_wait", "step_ms", "loader_share", "train_seconds"}


@pytest.fixture
def unet(tmp_path: Path) -> Unet:
    """A tiny UNet by Muon on proteins that walk one circle of the amino acids; `plm__x` changes the plm section."""
    rng = np.random.default_rng(0)
    circle = "".join(rng.permutation(list(AMINO_ACIDS))) * 4
    starts, lengths = rng.integers(0, 20, 200), rng.integers(12, 60, 200)
    path = tmp_path / "circles.fasta"
    path.write_text(
        "".join(f">p{i}\n{circle[s : s + n]}\n" for i, (s, n) in enumerate(zip(starts, lengths, strict=True)))
    )

    def make(name: str, **changes: Any) -> Experiment:
        section = {
            "architecture": "unet", "fasta": str(path), "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2,
            "max_length": 60, "holdout": 0.1, "pack_tokens": 256, "eval_every": 4, "eval_tokens": 1024, "window": 16,
            "muon_momentum_warmup_steps": 6,
        }  # fmt: skip
        train: dict[str, Any] = {
            "kind": "plm", "batch_tokens": 512, "tokens": 512 * 12, "optimizer": "muon", "log_every": 1,
            "checkpoint_every": 5, "lr_warmup_steps": 2, "betas": [0.8, 0.95],
        }  # fmt: skip
        rest: dict[str, Any] = {}
        for key, value in changes.items():
            place, _, field = key.rpartition("__")
            {"": train, "plm": section, "run": rest}[place][field] = value
        root = str(tmp_path / "runs")
        return Experiment.model_validate({"name": name, "root": root, "train": {**train, "plm": section}, **rest})

    return make


def science_of(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCK} for line in lines]


def newest(run: Path) -> Restored:
    found = load_newest(run / "checkpoints")
    assert found is not None
    return found


def facts_of(run: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((run / "plm" / "config.json").read_text())["facts"]
    return facts


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(point: str, **where: object) -> None:
        if where.get("step") == step:
            STOP.request()

    monkeypatch.setattr(loop, "fault", fault)


def test_a_stopped_run_is_bit_equal_and_two_ranks_continue_what_one_began(
    unet: Unet, go: Go, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With diffusion, its warm-up, an average and tied embeddings, of which all has to be kept."""
    options = {
        "plm__objective": "masked_diffusion", "plm__diffusion_warmup_steps": 6, "plm__ema": 0.8,
        "plm__tie_embeddings": True,
    }  # fmt: skip
    whole = go(unet("whole", **options)).run.path
    for name in ("parts", "two"):
        stop_at(6, monkeypatch)
        with pytest.raises(Interrupted):
            go(unet(name, **options))
        monkeypatch.undo()
        STOP.asked = False
    before = newest(whole.parent / "parts").state["train_seconds"]
    parts = go(unet("parts", **options)).run.path
    assert science_of(whole) == science_of(parts)
    first, second = newest(whole), newest(parts)
    assert all(torch.equal(first.tensors[k], second.tensors[k]) for k in first.tensors | second.tensors)
    assert second.state["train_seconds"] > before > 0, "the clock goes on over starts"
    assert facts_of(parts)["train_seconds"] == second.state["train_seconds"]

    # What was saved is the average, loads back, and has one embedding.
    saved = load_plm(str(whole / "plm"))
    assert isinstance(saved, UNet)
    assert "lm_head.decoder_VD" not in dict(saved.named_parameters())
    for name, parameter in saved.named_parameters():
        assert torch.equal(parameter, first.tensors[f"ema.{name}"])
    assert any(not torch.equal(p, first.tensors[f"model.{n}"]) for n, p in saved.named_parameters())

    two = go(unet("two", run__launch={"ranks": 2}, **options)).run.path
    hardware = {entry.run: entry.hardware for entry in leaderboard(whole.parent, "quality")}
    assert (hardware["whole"][:4], hardware["two"][:4]) == ("1 x ", "2 x "), "of the ranks that ended it"
    for a, b in zip(science_of(whole), science_of(two), strict=True):
        if "valid" in a:
            assert b["valid"]["random"]["loss"] == pytest.approx(a["valid"]["random"]["loss"], rel=1e-4)
        else:
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
            assert b["masked"] == pytest.approx(a["masked"], rel=1e-6), "a share of all ranks' residues"
    for name, tensor in first.tensors.items():
        torch.testing.assert_close(newest(two).tensors[name], tensor, rtol=1e-3, atol=5e-4)


def test_it_learns_and_embed_reads_it(unet: Unet, go: Go, tmp_path: Path) -> None:
    experiment = unet("learnt", tokens=512 * 100, plm__eval_every=1000)
    run = go(experiment).run.path
    facts = facts_of(run)
    assert facts["valid"]["random"]["loss"] < 0.4 * facts["unigram_entropy"]
    assert experiment.train is not None
    assert experiment.train.plm is not None
    body = {"fasta": experiment.train.plm.fasta, "layers": [0, 1, 2], "dtype": "float32", "holdout": 0.1}
    embedded = Experiment.model_validate(
        {"name": "e", "root": str(tmp_path / "runs"), "model": {"weights": str(run / "plm")}, "embed": body}
    )
    go(embedded)
    own = load_plm(str(run / "plm"))
    trained = newest(run).tensors
    assert all(torch.equal(p, trained[f"model.{name}"]) for name, p in own.named_parameters())
    for layer in (0, 1, 2):
        folder = Lineage(embedded, Store()).embed(layer).folder
        made = read_manifest(Store(), folder)
        assert made is not None
        assert made["final_layer_norm"] is False  # the last layer too has none
        assert made["convention"].endswith("last without a norm")
        table = read_proteins(Store(), join(folder, "proteins.parquet"), split="train")
        shards = ActivationShards(Store(), folder)
        rows = torch.empty(shards.stop, 32)
        shards.read_into(0, rows)
        for index in (0, len(table) - 1):
            protein = {name: table[name][index].as_py() for name in ("sequence", "row_offset", "rows")}
            packed = pack([encode(protein["sequence"])])
            with torch.inference_mode():
                hidden = own(packed.tokens_T, packed.documents, layers=[layer]).hidden[layer]
            found = rows[protein["row_offset"] : protein["row_offset"] + protein["rows"]]
            torch.testing.assert_close(found, hidden[1:-1], rtol=1e-4, atol=1e-5)


def test_a_race_ends_at_its_loss_and_a_finished_one_starts_no_step(unet: Unet, go: Go) -> None:
    race = {"plm__speedrun": {"target_loss": 3.2, "max_parameters": 100_000}}
    run = go(unet("race", tokens=512 * 400, checkpoint_every=1000, **race)).run.path
    lines = science_of(run)
    validations = [line for line in lines if "valid" in line]
    losses = [line["valid"]["random"]["loss"] for line in validations]
    assert all(loss >= 3.2 for loss in losses[:-1])
    assert losses[-1] < 3.2
    step = validations[-1]["step"]
    assert step == newest(run).step == facts_of(run)["steps"] < 400
    assert facts_of(run)["tokens"] == 512 * step
    # As after a kill between the checkpoint and the export.
    (run / "parts" / "train.json").unlink()
    go(unet("race", tokens=512 * 400, checkpoint_every=1000, **race))
    assert [line["step"] for line in science_of(run)] == [line["step"] for line in lines]


def test_a_race_without_a_random_split_is_about_the_first_set_by_name(unet: Unet, go: Go) -> None:
    fasta = unet("any").train.plm.fasta  # type: ignore[union-attr]
    race = {"plm__holdout": 0.0, "plm__valid": {"b": fasta, "a": fasta}, "plm__speedrun": {"target_loss": 50.0}}
    run = go(unet("named", **race)).run.path
    assert facts_of(run)["steps"] == 4, "the first validation"


def test_what_ends_a_run_is_of_its_identity(unet: Unet) -> None:
    def key(**changes: Any) -> dict[str, Any]:
        return Lineage(unet("same", **changes), Store()).run_identity()

    hours, race = {"plm__max_hours": 1.0}, {"plm__speedrun": {"target_loss": 2.0}}
    assert key(**hours) != key() != key(**race)
    assert key(plm__speedrun={"target_loss": 2.0, "max_parameters": 10**9}) == key(**race), "a limit changes no result"


def test_hours_end_it(unet: Unet, go: Go) -> None:
    one = go(unet("one", plm__max_hours=1e-7)).run.path  # less than a step
    assert newest(one).step == facts_of(one)["steps"] == 1
    validations = [line for line in science_of(one) if "valid" in line]
    assert [line["step"] for line in validations] == [1], "the last step is validated, as any other last step"
    assert validations[0]["valid"] == facts_of(one)["valid"]


def test_with_a_later_end_it_goes_on_to_what_it_would_have_been(unet: Unet, go: Go) -> None:
    """Hours, then a race, then none: each time the finished run goes on, and ends bit for bit as one that was never ended."""
    go(unet("on", plm__max_hours=1e-7))
    with pytest.raises(RunDiffers, match="max_hours: 1e-07 -> 5e-08"):
        go(unet("on", plm__max_hours=5e-8))
    race = {"plm__speedrun": {"target_loss": 50.0}}
    with pytest.raises(RunDiffers, match="speedrun"):
        go(unet("on", plm__max_hours=1.0, **race))  # an end that it did not have
    longer = go(unet("on", plm__max_hours=1.0)).run.path
    assert newest(longer).step == facts_of(longer)["steps"] == 12
    assert [line["step"] for line in science_of(longer) if "loss" in line] == list(range(1, 13))
    won = go(unet("won", **race)).run.path
    assert facts_of(won)["steps"] == 4
    go(unet("won", plm__speedrun={"target_loss": 0.1}))
    assert facts_of(won)["steps"] == 12
    whole = go(unet("whole", plm__max_hours=1.0)).run.path
    for run in (longer, won):
        assert (run / "plm" / "model.safetensors").read_bytes() == (whole / "plm" / "model.safetensors").read_bytes()
    # Without any race it is the same run, at its end already.
    assert go(unet("won")).run.path == won
    assert facts_of(won)["steps"] == 12


@pytest.mark.slow
def test_hours_end_it_on_all_ranks_after_one_step(unet: Unet, go: Go) -> None:
    hours = 1e-7
    two = go(unet("two", plm__max_hours=hours, tokens=512 * 64, run__launch={"ranks": 2})).run.path
    assert newest(two).step == 32, "asked at step 16, agreed at the next such step"
    assert facts_of(two)["steps"] == 32


def test_a_model_too_large_for_the_race_is_refused_with_its_size(unet: Unet) -> None:
    with pytest.raises(UserError, match=r"max_parameters is 1,000, the model has [\d,]+ parameters"):
        plan_stage("train", unet("big", plm__speedrun={"target_loss": 2.0, "max_parameters": 1000}), Store())


def test_the_plan_says_what_updates_which_parameters(unet: Unet) -> None:
    figures = plan_stage("train", unet("plan"), Store()).figures
    groups = {
        name.removeprefix("parameters_"): text for name, text in figures.items() if name.startswith("parameters_")
    }
    counts = {name: int(text.split(" ")[0].replace(",", "")) for name, text in groups.items()}
    assert sum(counts.values()) == figures["parameters"]
    assert groups["hidden"].endswith("by muon, lr 0.05, weight decay 0.01")
    assert groups["embed"].endswith("by adam, lr 0.06, no weight decay")
    assert groups["head"].endswith("by adam, lr 0.008, weight decay 0.01")
    assert groups["head_vectors"].endswith("by adam, lr 0.008, no weight decay")
    assert groups["scalar"].endswith("by adam, lr 0.04, no weight decay")
    assert counts["scalar"] == 2 * (2 + 2) + 1
