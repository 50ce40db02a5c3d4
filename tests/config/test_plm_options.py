"""Options of language models: combinations without effect are refused, and old runs keep their identity."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from plmsae_cli.config.experiment import Train
from plmsae_cli.config.plm import UNET_ONLY
from plmsae_cli.config.tree import entries


def train(plm: dict[str, Any], **options: Any) -> Train:
    return Train.model_validate({"kind": "plm", "plm": {"fasta": "x", "pack_tokens": 2048, **plm}, **options})


OTHER = {
    "expansion_ratio": 2.0, "soft_logit_cap": 16.0, "attention_soft_cap": 50.0, "tie_embeddings": True, "unet": False,
    "value_embeddings": False, "mask_embedding": False, "p_attention": True, "num_att_tokens": 64, "window": 512,
}  # fmt: skip


@pytest.mark.parametrize("name", UNET_ONLY)
def test_options_of_the_unet_are_refused_beside_esm2(name: str) -> None:
    with pytest.raises(ValidationError, match=f"{name} has no effect with architecture: esm2"):
        train({name: OTHER[name]})
    others = {"p_attention": True} if name == "num_att_tokens" else {}
    assert getattr(train({"architecture": "unet", name: OTHER[name], **others}).plm, name) == OTHER[name]


@pytest.mark.parametrize(
    ("plm", "options", "message"),
    [
        ({"architecture": "unet", "num_layers": 5}, {}, "a UNet has two halves"),
        ({"architecture": "unet", "num_att_tokens": 64}, {}, "no effect without p_attention"),
        ({"architecture": "unet", "unet": False, "value_embeddings": False}, {}, "no effect with unet: false"),
        ({"diffusion_warmup_steps": 9}, {}, "no effect with objective: mlm"),
        ({"mask_rate_steps": 9}, {}, "no effect without starting_mask_rate"),
        ({"objective": "masked_diffusion", "starting_mask_rate": 0.1}, {}, "no diffusion_warmup_steps"),
        ({"muon_momentum_warmup_steps": 9}, {}, "no effect with optimizer: adam"),
        ({"cooldown_steps": 9}, {"lr_decay": 0.3}, "plm.cooldown_steps says how long"),
        ({"speedrun": {}}, {}, "target_loss"),
        ({"speedrun": {"target_loss": 2.1}, "holdout": 0.0}, {}, "there is no validation set"),
        ({"speedrun": {"target_loss": 2.1, "parameters": 3}}, {}, "parameters"),
    ],
    ids=str,
)
def test_senseless_combinations_are_refused(plm: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        train(plm, **options)


def test_later_options_are_in_an_identity_only_where_they_are_used() -> None:
    began_with = {
        "architecture", "num_layers", "hidden_size", "num_attention_heads", "max_length", "holdout", "mask_rate",
        "corruption", "weight_decay", "pack_tokens",
    }  # fmt: skip
    plain = train({}).plm
    assert plain is not None
    assert plain.science().keys() == began_with
    used = train({"ema": 0.9, "lr_hidden": 0.1, "speedrun": {"target_loss": 2.0}, "max_hours": 8.0}).plm
    assert used is not None
    ends = {"speedrun": {"target_loss": 2.0}, "max_hours": 8.0}
    assert used.science() == plain.science() | {"ema": 0.9, "lr_hidden": 0.1} | ends


def test_every_option_has_a_help() -> None:
    assert all(entry.help for path, entry in entries().items() if path.startswith("train.plm"))
