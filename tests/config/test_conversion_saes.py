"""Other tools' configurations: what maps, what is noted, and that the result is an experiment."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from plmsae_cli.cli.app import app
from plmsae_cli.config.conversion import SOURCES, convert_file
from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.config.yaml import load

RUNNER: dict[str, Any] = {
    "model_name": "facebook/esm2_t12_35M_UR50D", "hook_name": "blocks.5.hook_resid_post", "dataset_path": "some/proteins",
    "sae": {"architecture": "standard", "d_in": 480, "d_sae": 3840, "l1_coefficient": 5.0, "l1_warm_up_steps": 1000,
            "normalize_activations": "expected_average_only_in", "apply_b_dec_to_input": False},
    "training_tokens": 40_960_000, "train_batch_size_tokens": 4096, "lr": 5e-5, "lr_warm_up_steps": 0, "lr_decay_steps": 2000,
    "lr_scheduler_name": "constant", "adam_beta1": 0.9, "adam_beta2": 0.95, "seed": 42, "device": "cuda", "autocast": True,
    "dead_feature_window": 1000, "n_checkpoints": 3, "mystery": 7,
    "logger": {"log_to_wandb": True, "wandb_project": "sae", "wandb_log_frequency": 30},
}  # fmt: skip
TRAINER: dict[str, Any] = {
    "trainer": {"trainer_class": "MatryoshkaBatchTopKTrainer", "dict_class": "MatryoshkaBatchTopKSAE", "lr": 2e-4,
                "steps": 10_000, "warmup_steps": 500, "decay_start": 8000, "auxk_alpha": 0.03125, "seed": 1,
                "activation_dim": 320, "dict_size": 4096, "k": 40, "group_fractions": [0.25, 0.25, 0.5],
                "group_weights": [0.5, 0.3, 0.2], "device": "cuda:0", "layer": 3, "lm_name": "EleutherAI/pythia-70m",
                "wandb_name": "x", "submodule_name": "resid_post_layer_3"},
    "buffer": {"d_submodule": 320, "out_batch_size": 2048, "n_ctxs": 244},
}  # fmt: skip


def convert(text: str) -> tuple[str, list[str]]:
    found: tuple[str, list[str]] = next(tool for tool in SOURCES.values() if tool.recognises(text)).convert(text)
    return found


def experiment(text: str, folder: Path) -> Experiment:
    path = folder / "converted.yaml"
    path.write_text(text)
    return load(path).experiment


def saelens(**sae: Any) -> str:
    return json.dumps({**RUNNER, "sae": {"d_in": 480, "d_sae": 3840, **sae}})


def test_a_saelens_runner(tmp_path: Path) -> None:
    text, notes = convert(json.dumps(RUNNER))
    found = experiment(text, tmp_path)
    assert found.train is not None
    train, sae = found.train, found.train.autoencoder()
    assert (sae.architecture, sae.num_latents, sae.sparsity_coefficient, sae.sparsity_warmup) == (
        "relu_l1",
        3840,
        5.0,
        0.1,
    )
    assert (train.tokens, train.batch_tokens, train.lr, train.lr_warmup_steps, train.lr_decay) == (
        40_960_000,
        4096,
        5e-5,
        0,
        0.2,
    )
    assert (train.betas, train.seed, train.compute, train.dead_tokens) == ([0.9, 0.95], 42, "bfloat16", 4_096_000)
    assert (train.log_every, train.checkpoint_every) == (30, 2500)
    assert (found.wandb.mode, found.wandb.project) == ("online", "sae")
    assert found.model.weights == "esm2_t12_35M_UR50D"
    assert found.embed is not None
    assert found.embed.layers == [6]  # behind the sixth block
    assert sorted(notes) == [
        "apply_b_dec_to_input: false: no counterpart",
        "dataset_path: some/proteins: proteins are named by embed.fasta",
        "mystery: 7: no counterpart",
    ]
    assert all(note in text for note in notes)


@pytest.mark.parametrize(("sae", "expected"), [
    ({"architecture": "topk", "k": 64}, {"architecture": "topk", "k": 64}),
    ({"architecture": "batchtopk", "k": 32.0}, {"architecture": "batch_topk", "k": 32}),
    ({"architecture": "matryoshka_batchtopk", "k": 16, "matryoshka_widths": [960, 1920]},
     {"architecture": "matryoshka_batch_topk", "k": 16, "fractions": [0.25, 0.25, 0.5]}),
    ({"architecture": "jumprelu", "l0_coefficient": 2.0, "jumprelu_bandwidth": 0.05, "jumprelu_init_threshold": 0.01},
     {"architecture": "jumprelu", "sparsity_coefficient": 2.0, "bandwidth": 0.05, "theta_start": 0.01}),
    ({"architecture": "jumprelu", "jumprelu_sparsity_loss_mode": "tanh", "jumprelu_tanh_scale": 3.0},
     {"architecture": "jumprelu", "penalty": "tanh", "tanh_scale": 3.0}),
    ({"architecture": "gated", "l1_coefficient": 1.5}, {"architecture": "gated", "sparsity_coefficient": 1.5}),
    ({"activation_fn": "topk", "activation_fn_kwargs": {"k": 20}}, {"architecture": "topk", "k": 20}),
    ({"d_sae": None, "expansion_factor": 8}, {"expansion": 8.0, "num_latents": None}),
])  # fmt: skip
def test_saelens_architectures(sae: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    found = experiment(convert(saelens(**sae))[0], tmp_path)
    assert found.train is not None
    body = found.train.autoencoder().model_dump()
    assert {name: body[name] for name in expected} == expected


def test_a_dictionary_learning_trainer(tmp_path: Path) -> None:
    text, notes = convert(json.dumps(TRAINER))
    found = experiment(text, tmp_path)
    assert found.train is not None
    train, sae = found.train, found.train.autoencoder()
    assert (sae.architecture, sae.num_latents, sae.k, sae.fractions) == (
        "matryoshka_batch_topk",
        4096,
        40,
        [0.25, 0.25, 0.5],
    )
    assert sae.aux_coefficient == 0.03125
    assert (train.tokens, train.batch_tokens, train.lr, train.lr_warmup_steps, train.lr_decay) == (
        20_480_000, 2048, 2e-4, 500, 0.2,
    )  # fmt: skip
    assert found.embed is not None
    assert found.embed.layers == [4]
    assert [note.partition(":")[0] for note in notes] == ["group_weights", "model EleutherAI/pythia-70m"]


@pytest.mark.parametrize(("trainer", "expected"), [
    ({"trainer_class": "StandardTrainer", "l1_penalty": 0.06, "sparsity_warmup_steps": 2000, "steps": 20000},
     {"architecture": "relu_l1", "sparsity_coefficient": 0.06, "sparsity_warmup": 0.1, "unit_rows": True}),
    ({"trainer_class": "GatedSAETrainer", "l1_penalty": 0.06}, {"architecture": "gated", "sparsity_coefficient": 0.06}),
    ({"trainer_class": "JumpReluTrainer", "sparsity_penalty": 1.0, "target_l0": 20, "bandwidth": 0.001},
     {"architecture": "jumprelu", "sparsity_coefficient": 1.0, "target_l0": 20.0, "bandwidth": 0.001}),
    ({"trainer_class": "<class 'trainers.TopKTrainer"[8:], "k": 100}, {"architecture": "topk", "k": 100}),
])  # fmt: skip
def test_trainers(trainer: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    text, notes = convert(json.dumps({"dict_size": 512, "lr": 1e-3, **trainer}))
    found = experiment(text, tmp_path)
    assert found.train is not None
    body = found.train.autoencoder().model_dump()
    assert {name: body[name] for name in expected} == expected
    assert any("the batch is not in the file" in note for note in notes)


@pytest.mark.parametrize(("text", "message"), [
    ("{", "is not a file of settings of"),
    ("[1, 2]", "is not a file of settings of"),
    ("lr: 1", "is not a file of settings of"),
    (saelens(architecture="transcoder"), "the architecture transcoder has no counterpart"),
    (json.dumps({"trainer_class": "PAnnealTrainer"}), "the trainer PAnnealTrainer has no counterpart"),
    (saelens(d_sae="many"), "a value is not what its name asks for: .*many"),
    (json.dumps({"trainer_class": "TopKTrainer", "dict_size": [3]}), "a value is not what its name asks for"),
])  # fmt: skip
def test_what_cannot_be_converted(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "old").write_text(text)
    with pytest.raises(UserError, match=message):
        convert_file(tmp_path / "old")


def test_a_secret_is_not_copied() -> None:
    text, notes = convert(json.dumps({**RUNNER, "hf_token": "abc123", "wandb_key": "abc123"}))
    assert "abc123" not in text
    assert not any("abc123" in note for note in notes)
    assert {"hf_token: ***: no counterpart", "wandb_key: ***: no counterpart"} <= set(notes)


def test_init_from(tmp_path: Path) -> None:
    source, target = tmp_path / "config.json", tmp_path / "mine.yaml"
    source.write_text(
        json.dumps({**TRAINER, "trainer": {**TRAINER["trainer"], "odd\nkey: [": "value\n# not: a comment"}})
    )
    done = CliRunner().invoke(app, ["init", str(target), "--from", str(source)])
    assert done.exit_code == 0, done.output
    assert "  group_weights: " in done.stderr
    assert load(target).experiment.train is not None  # whatever a setting holds, it stays in a comment
    missing = CliRunner().invoke(app, ["init", str(tmp_path / "b.yaml"), "--from", str(tmp_path / "none.json")])
    assert (missing.exit_code, "no such file" in missing.stderr) == (2, True)
    assert not (tmp_path / "b.yaml").exists()
