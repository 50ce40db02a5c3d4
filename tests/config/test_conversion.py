"""Settings of SpeedrunningPLMs as experiments: every name understood, told of, or named as unknown."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.config.conversion import convert_file
from plmsae_cli.config.conversion.speedrunning_plms import TAKEN
from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.config.plm import PLM
from plmsae_cli.config.yaml import load

OLD = {
    "save_path": "me/speedrun", "log_name": "My Run!", "seed": 7, "clear_cache_every": 1000, "hidden_size": 384,
    "num_attention_heads": 6, "num_hidden_layers": 12, "vocab_size": 33, "expansion_ratio": 2.6667, "soft_logit_cap": 16.0,
    "attention_soft_cap": 64.0, "add_att_soft_cap": True, "tie_embeddings": True, "unet": True, "p_attention": True,
    "num_att_tokens": 128, "token_dropout": True, "mlm": False, "masked_diffusion": False, "mask_rate": 0.2,
    "mask_rate_schedule": True, "starting_mask_rate": 0.1, "mask_rate_steps": 250, "batch_size": 524288, "grad_accum": 8,
    "num_steps": 5000, "cooldown_steps": 500, "max_length": 1024, "scheduler_type": "cosine", "lr_warmup_steps": 100, "lr": 0.001,
    "lr_embed": 0.06, "lr_head": 0.008, "lr_scalar": 0.04, "grad_clip": 0.0, "use_muon": True, "lr_hidden": 0.05,
    "muon_momentum_warmup_steps": 200, "eval_every": 500, "save_every": None, "num_workers": 4, "prefetch_factor": 2,
    "hf_model_name": "me/model", "input_bin": "d/t_*.bin", "input_valid_bin": "d/v_*.bin", "input_test_bin": "d/e_*.bin",
}  # fmt: skip


def converted(tmp_path: Path, **changes: Any) -> tuple[Experiment, list[str]]:
    lines = [f"{name}: {'null' if value is None else value}" for name, value in {**OLD, **changes}.items()]
    (tmp_path / "old.yaml").write_text(
        "# theirs\n" + "\n".join(lines).replace("True", "true").replace("False", "false")
    )
    text, notes = convert_file(tmp_path / "old.yaml")
    (tmp_path / "new.yaml").write_text(text)
    return load(tmp_path / "new.yaml").experiment, notes


def plm_of(experiment: Experiment) -> PLM:
    assert experiment.train is not None
    assert experiment.train.plm is not None
    return experiment.train.plm


def test_every_setting_arrives(tmp_path: Path) -> None:
    experiment, notes = converted(tmp_path)
    train, plm = experiment.train, plm_of(experiment)
    assert train is not None
    assert experiment.name == "my-run"
    assert (train.seed, train.batch_tokens, train.tokens) == (7, 524288, 5000 * 524288)
    assert (train.optimizer, train.betas, train.grad_clip, train.lr_warmup_steps) == ("muon", [0.8, 0.95], None, 100)
    assert (plm.architecture, plm.num_layers, plm.hidden_size, plm.num_attention_heads) == ("unet", 12, 384, 6)
    assert (plm.expansion_ratio, plm.soft_logit_cap, plm.attention_soft_cap) == (2.6667, 16.0, 64.0)
    assert (plm.tie_embeddings, plm.unet, plm.p_attention, plm.num_att_tokens) == (True, True, True, 128)
    assert not plm.mask_embedding
    assert (plm.objective, plm.mask_rate, plm.starting_mask_rate, plm.mask_rate_steps) == ("mlm", 0.2, 0.1, 250)
    assert (plm.cooldown_steps, plm.scheduler_type, plm.max_length, plm.eval_every) == (500, "cosine", 1022, 500)
    assert (plm.lr_hidden, plm.lr_embed, plm.lr_head, plm.lr_scalar) == (0.05, 0.06, 0.008, 0.04)
    assert (plm.muon_momentum_warmup_steps, plm.pack_tokens, plm.holdout) == (200, 65536, 0.0)
    assert (plm.bin, plm.valid) == ("d/t_*.bin", {"valid": "d/v_*.bin", "test": "d/e_*.bin"})
    told = {note.partition(":")[0] for note in notes}
    assert told >= {
        "num_workers",
        "prefetch_factor",
        "clear_cache_every",
        "lr",
        "hf_model_name",
        "max_length",
    }
    assert not any("unknown" in note or "secrets" in note for note in notes)
    assert set(OLD) <= TAKEN


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        (
            {"masked_diffusion": True, "mask_rate_schedule": False},
            {"objective": "masked_diffusion", "starting_mask_rate": None},
        ),
        ({"masked_diffusion": True}, {"objective": "masked_diffusion", "diffusion_warmup_steps": 250}),
        ({"token_dropout": False}, {"mask_embedding": True}),
        ({"add_att_soft_cap": False}, {"attention_soft_cap": None}),
        ({"p_attention": False}, {"p_attention": False, "num_att_tokens": 512}),
        ({"cooldown_steps": 0, "scheduler_type": "constant"}, {"cooldown_steps": None, "scheduler_type": "linear"}),
        ({"batch_size": 8192, "grad_accum": 1}, {"pack_tokens": 8192}),
        ({"batch_size": 4 * 65536 + 2, "grad_accum": 4}, {"pack_tokens": (4 * 65536 + 2) // 6}),
    ],
)
def test_values_that_hang_together(tmp_path: Path, changes: dict[str, Any], wanted: dict[str, Any]) -> None:
    plm = plm_of(converted(tmp_path, **changes)[0])
    assert {name: getattr(plm, name) for name in wanted} == wanted


def test_adam_alone_and_old_names(tmp_path: Path) -> None:
    experiment, notes = converted(
        tmp_path, use_muon=False, grad_clip=2.0, save_every=100, bfloat16=False, wandb_token="abc", hidden=3
    )
    train = experiment.train
    assert train is not None
    assert (train.optimizer, train.lr, train.grad_clip, train.checkpoint_every) == ("adam", 0.001, 2.0, 100)
    assert (train.compute, plm_of(experiment).lr_hidden) == ("auto", "auto")
    assert any(note.startswith("bfloat16: there TF32") for note in notes)
    assert "hidden: unknown, and left out" in notes
    assert sum("secrets stay out" in note for note in notes) == 1
    assert not any("abc" in note for note in notes)
    assert "abc" not in (tmp_path / "new.yaml").read_text()


def test_what_a_switch_leaves_without_effect_is_said(tmp_path: Path) -> None:
    off = {"mask_rate_schedule": False, "starting_mask_rate": 0.1, "use_muon": False, "lr_embed": 0.06}
    experiment, notes = converted(tmp_path, **off)
    assert plm_of(experiment).starting_mask_rate is None
    assert "starting_mask_rate: of no effect there without mask_rate_schedule, and left out" in notes
    assert "lr_embed: of no effect there without use_muon, and left out" in notes
    _, notes = converted(tmp_path, mask_rate_schedule=True, starting_mask_rate=0.1, use_muon=True)
    assert not any("without" in note for note in notes)


def test_flags_of_a_command_line(tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text(
        "torchrun train.py --num_hidden_layers 4 \\\n --lr_hidden=0.02 --use_muon true --batch-size 65536 --unet --bugfix\n"
    )
    text, notes = convert_file(tmp_path / "run.sh")
    (tmp_path / "new.yaml").write_text(text)
    plm = plm_of(load(tmp_path / "new.yaml").experiment)
    assert (plm.num_layers, plm.lr_hidden, plm.unet, plm.bin) == (
        4,
        0.02,
        True,
        "data/omg_prot50/omg_prot50_train_*.bin",
    )
    assert any(note.startswith("bugfix: no counterpart: it is a flag here") for note in notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\n", "is not a file of settings of"),
        ("use_muon: true\nlr_hidden: fast\nnum_steps: 3\n", "a value is not what its name asks for"),
        ("use_muon: true\nnum_hidden_layers: 3\nunet: true\n", "num_layers"),
        ("use_muon: [\n", "is not a file of settings of"),
        ('python train.py --use_muon --lr_hidden 1 --input_bin "a\n', "is not a file of settings of"),
        ("python train.py --use_muon --lr_hidden [1\n", "is not a file of settings of"),
    ],
)
def test_what_cannot_be_converted(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        convert_file(tmp_path / "x.yaml")
    with pytest.raises(UserError, match="no such file"):
        convert_file(tmp_path / "absent.yaml")


def test_comments_that_speak_of_flags_do_not_make_a_command_line_of_a_yaml(tmp_path: Path) -> None:
    plain, _ = converted(tmp_path)
    path = tmp_path / "old.yaml"
    path.write_text("# tokens (--hf_token, --wandb_token) must be passed via CLI\n" + path.read_text())
    (tmp_path / "again.yaml").write_text(convert_file(path)[0])
    assert load(tmp_path / "again.yaml").experiment.train == plain.train


def test_a_launchers_flags_are_not_the_programs(tmp_path: Path) -> None:
    path = tmp_path / "run.sh"
    path.write_text("torchrun --standalone --nproc_per_node=4 train.py \\\n  --mlm --use_muon --lr_hidden 0.03\n")
    text, notes = convert_file(path)
    (tmp_path / "new.yaml").write_text(text)
    assert plm_of(load(tmp_path / "new.yaml").experiment).lr_hidden == 0.03
    assert not any("unknown" in note for note in notes)


def test_their_other_unet_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="patch_unet: True describes an architecture"):
        converted(tmp_path, patch_unet=True, num_unet_layers=12, num_hidden_layers=0)
    assert converted(tmp_path, patch_unet=False, num_unet_layers=0, num_extra_layers=0)[0] == converted(tmp_path)[0]
