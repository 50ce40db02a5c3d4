"""dictionary_learning: the `config.json` that a trainer leaves beside its dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plmsae_cli.config.conversion.draft import Draft, parse, share
from plmsae_cli.config.errors import UserError

NAME = "dictionary_learning"

_KINDS = {
    "StandardTrainer": "relu_l1",
    "StandardTrainerAprilUpdate": "relu_l1",
    "GatedSAETrainer": "gated",
    "TrainerJumpRelu": "jumprelu",
    "JumpReluTrainer": "jumprelu",
    "TopKTrainer": "topk",
    "BatchTopKTrainer": "batch_topk",
    "MatryoshkaBatchTopKTrainer": "matryoshka_batch_topk",
}
_BATCH = 8192  # where the buffer does not say
_COMFORTS = {
    "device", "wandb_name", "dict_class", "activation_dim", "threshold_beta", "threshold_start_step", "top_k_aux",
    "resample_steps", "buffer.d_submodule", "buffer.io", "buffer.n_ctxs", "buffer.refresh_batch_size", "buffer.device",
    "buffer.ctx_len",
}  # fmt: skip


def recognises(text: str) -> bool:
    """By the trainer's class."""
    try:
        return "trainer_class" in _trainer(parse(text))
    except UserError:
        return False


def convert(text: str) -> tuple[str, list[str]]:
    """See `conversion`. Raises UserError for a trainer that has no counterpart."""
    document = parse(text)
    trainer = _trainer(document)
    buffer = document.get("buffer")
    rest = {f"buffer.{key}": value for key, value in buffer.items()} if isinstance(buffer, Mapping) else {}
    draft = Draft(NAME, {**trainer, **rest}, _COMFORTS)
    kind = str(draft.get("trainer_class")).rpartition(".")[2]
    if kind not in _KINDS:
        raise UserError(f"the trainer {kind} has no counterpart", f"known: {', '.join(_KINDS)}")
    ours = draft.fields["train.sae.architecture"] = _KINDS[kind]
    draft.take("dict_size", "train.sae.num_latents", int)
    batch = draft.get("buffer.out_batch_size")
    if batch is None:
        batch = _BATCH
        draft.note(f"the batch is not in the file: train.batch_tokens {_BATCH} is a guess, and train.tokens with it")
    draft.fields["train.batch_tokens"] = int(batch)
    steps = int(draft.get("steps", 0))
    if steps:
        draft.fields["train.tokens"] = steps * int(batch)
    warmup = draft.get("sparsity_warmup_steps")
    if ours in ("topk", "batch_topk", "matryoshka_batch_topk"):
        draft.take("k", "train.sae.k", int)
        draft.take("auxk_alpha", "train.sae.aux_coefficient", float)
        if ours == "matryoshka_batch_topk":
            draft.take("group_fractions", "train.sae.fractions", lambda values: [float(value) for value in values])
            weights = draft.get("group_weights")
            if weights and len(set(weights)) > 1:
                draft.note(f"group_weights: {weights}: every prefix counts the same here")
    else:
        draft.take("l1_penalty", "train.sae.sparsity_coefficient", float)
        draft.take("sparsity_penalty", "train.sae.sparsity_coefficient", float)
        if warmup is not None and steps:
            draft.fields["train.sae.sparsity_warmup"] = share(warmup, steps)
        if kind == "StandardTrainer":
            draft.fields["train.sae.unit_rows"] = True
        if ours == "jumprelu":
            draft.take("bandwidth", "train.sae.bandwidth", float)
            draft.take("target_l0", "train.sae.target_l0", float)
    draft.take("lr", "train.lr", float)
    draft.take("warmup_steps", "train.lr_warmup_steps", int)
    start = draft.get("decay_start")
    if steps:
        draft.fields["train.lr_decay"] = 0.0 if start is None else share(steps - start, steps)
    draft.take("seed", "train.seed", int)
    draft.model(draft.get("lm_name"))
    draft.layer(draft.get("submodule_name"), draft.get("layer"))
    return draft.finish()


def _trainer(document: Mapping[str, Any]) -> Mapping[str, Any]:
    inner = document.get("trainer", document)
    return inner if isinstance(inner, Mapping) else {}
