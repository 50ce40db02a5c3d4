"""Dictionaries of other projects give the latents and the reconstructions that their own formulas give."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save_file
from torch.testing import assert_close

from plmsae_cli import load_sae
from plmsae_cli.config.errors import UserError
from plmsae_cli.config.imported import ImportedSAE
from plmsae_cli.runtime.dictionaries import read_dictionary
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.matryoshka import MatryoshkaBatchTopK

from .foreign_files import THETA, C, D, K, N, Sample, V, W, activations, learning, saelens

if TYPE_CHECKING:
    from tests.conftest import S3Server


def save_saelens(folder: Path, config: Mapping[str, object], sample: Sample) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    save_file({n: t.contiguous() for n, t in sample.state.items()}, folder / "sae_weights.safetensors")
    return str(folder)


def same(model: Dictionary, sample: Sample) -> None:
    """Each latent's contribution to the reconstruction, and the reconstruction; decoder rows of norm 1 but of TopK's kin."""
    x = activations()
    with torch.no_grad():
        ours_BN, theirs_BN = model.encode_dense(x), sample.encode(x)
        assert 0 < int((theirs_BN > 0).sum()) < theirs_BN.numel()
        lengths_N = model.w_dec_ND.norm(dim=1)
        assert_close(ours_BN * lengths_N, theirs_BN * sample.w_dec_ND.norm(dim=1), rtol=1e-5, atol=1e-5)
        assert_close(model(x), sample.decode(theirs_BN), rtol=1e-5, atol=1e-4)
        if not hasattr(model, "k"):
            assert_close(lengths_N, torch.ones(N))


@pytest.mark.parametrize("name", learning())
def test_dictionary_learning(tmp_path: Path, name: str) -> None:
    sample = learning()[name]
    torch.save(sample.state, tmp_path / "ae.pt")
    trainer = {"dict_class": name, "layer": 4, "lm_name": "facebook/esm2_t6_8M_UR50D"}
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {}}))
    found = read_dictionary(ImportedSAE(path=str(tmp_path)))
    assert (found.format, found.layer, found.weights) == ("dictionary_learning", 4, "facebook/esm2_t6_8M_UR50D")
    same(found.model, sample)
    same(load_sae(tmp_path / "ae.pt"), sample)
    if name == "MatryoshkaBatchTopKSAE":
        assert isinstance(found.model, MatryoshkaBatchTopK)
        assert found.model.prefixes == (4, 8, 16)


@pytest.mark.parametrize("theirs", [-1.0, 0.0])
def test_a_threshold_that_was_never_set_is_a_relu(tmp_path: Path, theirs: float) -> None:
    state = learning()["BatchTopKSAE"].state | {"threshold": torch.tensor(theirs)}
    torch.save(state, tmp_path / "ae.pt")
    model = read_dictionary(ImportedSAE(path=str(tmp_path), selection="batch_topk")).model
    x = activations()
    assert_close(model.encode_dense(x), ((x - C) @ W.T + state["encoder.bias"]).relu(), rtol=1e-5, atol=1e-5)


TAGS = "!!python/object:interplm.train.configs.TrainingRunConfig\n"


@pytest.mark.parametrize(
    ("theirs", "ours", "trainer"),
    [
        ("ReLUSAE", "AutoEncoder", "relu.ReLUTrainerConfig"),
        ("ReLUSAE_Tied", "AutoEncoderNew", "relu.ReLUTrainerConfig"),
        ("TopKSAE", "AutoEncoderTopK", "top_k.TopKTrainerConfig"),
        ("BatchTopKSAE", "BatchTopKSAE", "batch_top_k.BatchTopKTrainerConfig"),
    ],
)
def test_interplm(tmp_path: Path, theirs: str, ours: str, trainer: str) -> None:
    sample = learning()[ours]
    maxima_N = THETA + 1
    state = sample.state | {"normalize_to_sqrt_d": torch.tensor(False), "activation_rescale_factor": maxima_N}
    torch.save(state, tmp_path / "ae.pt")
    # A reader of YAML that runs tags would make a file here.
    trap = f"trap: !!python/object/apply:os.mknod ['{tmp_path / 'trapped'}']\n"
    (tmp_path / "config.yaml").write_text(
        f"{TAGS}{trap}trainer_cfg: !!python/object:interplm.train.trainers.{trainer}\n  lr: 0.0\n"
    )
    found = read_dictionary(ImportedSAE(path=str(tmp_path), weights="esm2_t6_8M_UR50D", layer=3))
    assert (found.format, found.weights, found.layer) == ("InterPLM", "esm2_t6_8M_UR50D", 3)
    same(found.model, sample)
    # What it divides latents by is their maximum, in their unit.
    ratio_N = sample.w_dec_ND.norm(dim=1) / found.model.w_dec_ND.detach().norm(dim=1)
    assert_close(found.model.maximum_N, maxima_N * ratio_N)
    assert not (tmp_path / "trapped").exists()


def test_interplm_jumprelu(tmp_path: Path) -> None:
    bias = learning()["AutoEncoder"].state["encoder.bias"]
    state = {"encoder.weight": W, "encoder.bias": bias, "decoder.weight": V.T, "decoder.bias": C, "threshold": THETA}
    torch.save(state | {"activation_rescale_factor": torch.ones(N)}, tmp_path / "layer_3.pt")
    found = read_dictionary(ImportedSAE(path=str(tmp_path / "layer_3.pt")))
    assert found.layer is None
    same(found.model, learning()["JumpReluAutoEncoder"])


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated", "topk", "topk by length"])
def test_saelens(tmp_path: Path, kind: str, centred: bool) -> None:
    config, sample = saelens(kind.split()[0], centred, by_length=kind.endswith("length"))
    config["metadata"] = {"sae_lens_version": "6.54.12", "model_name": "m", "hook_name": "blocks.4.hook_resid_post"}
    found = read_dictionary(ImportedSAE(path=save_saelens(tmp_path, config, sample)))
    assert (found.format, found.weights, found.layer) == ("SAELens", "m", 5)
    same(found.model, sample)


def test_saelens_settings_of_another_dictionary_are_refused(tmp_path: Path) -> None:
    config, sample = saelens("standard", True)
    for name, size in (("d_in", D), ("d_sae", N)):
        folder = save_saelens(tmp_path, config | {name: size + 1}, sample)
        with pytest.raises(UserError, match=rf"{name} {size + 1}\b.* W_enc is \({D}, {N}\)"):
            read_dictionary(ImportedSAE(path=folder))


def test_saelens_of_version_3(tmp_path: Path) -> None:
    _, sample = saelens("topk", True)
    old = {
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": K},
        "hook_point": "blocks.4.hook_resid_pre",
        "model_name": "gpt2",
        "normalize_activations": False,
    }
    found = read_dictionary(ImportedSAE(path=save_saelens(tmp_path, old, sample)))
    assert (found.weights, found.layer) == ("gpt2", 4)
    same(found.model, sample)


@pytest.mark.parametrize("kind", ["standard", "jumprelu", "gated", "topk"])
def test_a_norm_factor_is_folded(tmp_path: Path, kind: str) -> None:
    """Latents of x / factor, times the factor; reconstructions in the unit of x."""
    factor = 2.5
    config, sample = saelens(kind, True)
    path = save_saelens(tmp_path, config | {"normalize_activations": "expected_average_only_in"}, sample)
    with pytest.raises(UserError, match="expected_average_only_in"):
        read_dictionary(ImportedSAE(path=path))
    model = read_dictionary(ImportedSAE(path=path, norm_factor=factor)).model
    raw = Sample(sample.state, lambda x: factor * sample.encode(x / factor), V, factor * C)
    same(model, raw)


class _Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def _named(module: str, name: str, monkeypatch: pytest.MonkeyPatch) -> type:
    """A class that pickles under another project's name; while it is unpickled that project is not there."""
    made = type(name, (), {"__module__": module})
    parts = module.split(".")
    for end in range(1, len(parts) + 1):
        package = ".".join(parts[:end])
        monkeypatch.setitem(sys.modules, package, sys.modules.get(package, ModuleType(package)))
    setattr(sys.modules[module], name, made)
    return made


def test_saefold(tmp_path: Path) -> None:
    sample = learning()["MatryoshkaBatchTopKSAE"]
    path, factor = tmp_path / "3b-l36.ckpt", 40.0
    with pytest.MonkeyPatch.context() as patch:
        home = "dictionary_learning.trainers.matryoshka_batch_top_k"
        fractions = _named("omegaconf.listconfig", "ListConfig", patch)()
        fractions.__dict__ |= {"_content": [0.25, 0.25, 0.5]}
        settings = {
            "trainer_class": _named(home, "MatryoshkaBatchTopKTrainer", patch),
            "dict_class": _named(home, "MatryoshkaBatchTopKSAE", patch),
            "layer": 36,
            "lm_name": "3b",
            "k": K,
            "group_fractions": fractions,
        }
        body = {
            "epoch": 0,
            "pytorch-lightning_version": "2.5.0",
            "state_dict": {f"ae.{name}": tensor for name, tensor in sample.state.items()},
            "hyper_parameters": {"sae_trainer_cfg": settings, "logging_steps": 100},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-4}]}],
        }
        torch.save(body, path)
    with pytest.raises(UserError, match="norm_factor"):
        read_dictionary(ImportedSAE(path=str(path)))
    found = read_dictionary(ImportedSAE(path=str(path), norm_factor=factor))
    assert (found.format, found.weights, found.layer) == ("SAEFold", "3b", 36)
    same(found.model, Sample({}, lambda x: factor * sample.encode(x / factor), sample.w_dec_ND, factor * C))
    torch.save(sample.state, path)
    plain = read_dictionary(ImportedSAE(path=str(path), norm_factor=1.0))
    same(plain.model, sample)


@pytest.mark.parametrize("name", ["ae.pt", "sae.ckpt"])
def test_a_pickle_that_runs_code_is_refused(tmp_path: Path, name: str) -> None:
    torch.save({"encoder.weight": W, "bias": _Evil(tmp_path / "ran")}, tmp_path / name)
    with pytest.raises(UserError, match="mkdir"):
        load_sae(tmp_path / name)
    (tmp_path / name).write_bytes(pickle.dumps(_Evil(tmp_path / "ran"), protocol=2))
    with pytest.raises(UserError, match=r"not data|not a checkpoint"):
        load_sae(tmp_path / name)
    assert not (tmp_path / "ran").exists()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown kind": ({"W_enc": W, "threshold": THETA}, "not one that is read"),
    "not tensors": ({"encoder.weight": [1, 2]}, "not a state dict"),
    "widths": (learning()["AutoEncoder"].state | {"decoder.weight": V[:, 1:].T}, "do not fit each other"),
    "a bias of another length": (learning()["AutoEncoder"].state | {"bias": C[1:]}, "do not fit each other"),
    "a threshold of another length": (
        learning()["JumpReluAutoEncoder"].state | {"threshold": THETA[1:]},
        "log_theta_N",
    ),
    "no settings": (learning()["AutoEncoderTopK"].state, "selection: topk or batch_topk"),
    "lengths": (learning()["AutoEncoder"].state | {"normalize_to_sqrt_d": torch.tensor(True)}, "normalize_to_sqrt_d"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_is_refused(tmp_path: Path, case: str) -> None:
    state, reason = REFUSED[case]
    torch.save(state, tmp_path / "ae.pt")
    with pytest.raises(UserError, match=reason) as caught:
        load_sae(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_k_beyond_the_dictionary_is_refused(tmp_path: Path) -> None:
    torch.save(learning()["AutoEncoderTopK"].state | {"k": torch.tensor(N + 1)}, tmp_path / "ae.pt")
    with pytest.raises(UserError, match=f"from 1 to {N}"):
        read_dictionary(ImportedSAE(path=str(tmp_path), selection="topk"))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"architecture": "transcoder"}, "architecture transcoder is not supported"),
        ({"normalize_activations": "layer_norm"}, "layer_norm changes every residue"),
        ({"normalize_activations": "constant_norm_rescale"}, "constant_norm_rescale changes every residue"),
        ({"activation_fn": "tanh-relu"}, "tanh-relu is not supported"),
        ({"reshape_activations": "hook_z"}, "hook_z is not supported"),
        ({"architecture": "jumprelu"}, "threshold"),
    ],
)
def test_what_saelens_does_otherwise_is_refused(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    config, sample = saelens("standard", True)
    with pytest.raises(UserError, match=reason):
        load_sae(save_saelens(tmp_path, config | change, sample))
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(UserError, match="is not JSON"):
        load_sae(tmp_path)


def test_settings_of_other_types_count_as_absent(tmp_path: Path) -> None:
    config, sample = saelens("standard", True)
    path = save_saelens(tmp_path / "lens", config | {"metadata": [1], "model_name": 3}, sample)
    found = read_dictionary(ImportedSAE(path=path))
    assert (found.weights, found.layer) == (None, None)
    torch.save(learning()["AutoEncoder"].state, tmp_path / "ae.pt")
    for trainer in ([], {"layer": "five", "lm_name": 3}, None):
        (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer}))
        found = read_dictionary(ImportedSAE(path=str(tmp_path)))
        assert (found.weights, found.layer) == (None, None)
    body = {"state_dict": {f"ae.{n}": t for n, t in sample.state.items()}, "hyper_parameters": [1]}
    torch.save(body, tmp_path / "odd.ckpt")
    with pytest.raises(UserError, match="not one that is read"):
        read_dictionary(ImportedSAE(path=str(tmp_path / "odd.ckpt"), norm_factor=1.0))


def test_from_s3(s3: S3Server, tmp_path: Path) -> None:
    config, sample = saelens("jumprelu", True)
    folder, store = Path(save_saelens(tmp_path / "lens", config, sample)), s3.store()
    for file in folder.iterdir():
        store.write(s3.url("lens", file.name), [file.read_bytes()])
    state = learning()["AutoEncoder"].state
    torch.save(state, tmp_path / "ae.pt")
    store.write(s3.url("ae.pt"), [(tmp_path / "ae.pt").read_bytes()])
    same(read_dictionary(ImportedSAE(path=s3.url("lens")), store).model, sample)
    same(read_dictionary(ImportedSAE(path=s3.url("ae.pt")), store).model, learning()["AutoEncoder"])


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no dictionary at"):
        read_dictionary(ImportedSAE(path=str(tmp_path)))
