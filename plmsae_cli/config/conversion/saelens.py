"""SAELens: a runner's configuration (JSON or YAML), or the `cfg.json` beside a trained SAE."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from plmsae_cli.config.conversion.draft import Draft, parse, share
from plmsae_cli.config.errors import UserError

NAME = "SAELens"

_KINDS = {
    "standard": "relu_l1",
    "gated": "gated",
    "jumprelu": "jumprelu",
    "topk": "topk",
    "batchtopk": "batch_topk",
    "matryoshka_batchtopk": "matryoshka_batch_topk",
}
_PARTS = ("sae", "logger", "metadata")
"""Sections of newer versions; the settings in them have the names that older ones had at the top."""
# Where and how fast, not what: our own defaults suit.
_COMFORTS = {
    "device", "act_store_device", "verbose", "compile_llm", "compile_sae", "llm_compilation_mode", "sae_compilation_mode",
    "store_batch_size_prompts", "n_batches_in_buffer", "n_batches_for_norm_estimate", "eval_every_n_wandb_logs",
    "n_eval_batches", "eval_batch_size_prompts", "checkpoint_path", "output_path", "save_final_checkpoint",
    "resume_from_checkpoint",
    "sae_lens_version", "sae_lens_training_version", "model_class_name", "model_kwargs", "model_from_pretrained_kwargs",
    "streaming", "run_name", "wandb_id", "log_weights_to_wandb", "log_optimizer_state_to_wandb", "log_activations_store_to_wandb",
    "prepend_bos", "is_dataset_tokenized", "dtype", "autocast_lm", "exclude_special_tokens", "dead_feature_threshold",
    "feature_sampling_window", "cached_activations_path", "use_cached_activations", "new_cached_activations_path",
    "activations_mixing_fraction", "hook_head_index", "hook_eval", "train_batch_size", "neuronpedia_id", "reshape_activations",
    "seqpos_slice", "context_size", "hook_name_out", "disable_concat_sequences", "sequence_separator_token",
}  # fmt: skip


def recognises(text: str) -> bool:
    """By the names of widths, which nobody else has."""
    try:
        flat = _flat(parse(text))
    except UserError:
        return False
    return "d_in" in flat and bool(flat.keys() & {"d_sae", "expansion_factor", "l1_coefficient", "hook_name"})


def convert(text: str) -> tuple[str, list[str]]:
    """See `conversion`. Raises UserError for an architecture that reconstructs something else than its input."""
    flat = _flat(parse(text))
    draft = Draft(NAME, flat, _COMFORTS)
    draft.get("d_in")  # the model's
    kind = str(draft.get("architecture", "standard"))
    kwargs = draft.get("activation_fn_kwargs", {})
    if draft.get("activation_fn", flat.get("activation_fn_str")) == "topk":
        kind = "topk"
    draft.get("activation_fn_str")
    if kind not in _KINDS:
        raise UserError(f"the architecture {kind} has no counterpart", f"known: {', '.join(_KINDS)}")
    ours = draft.fields["train.sae.architecture"] = _KINDS[kind]
    width = draft.get("d_sae")
    if width is not None:
        draft.fields["train.sae.num_latents"] = int(width)
        draft.get("expansion_factor")
    draft.take("expansion_factor", "train.sae.expansion", float)
    batch = int(draft.get("train_batch_size_tokens", 4096))
    draft.fields["train.batch_tokens"] = batch
    tokens = int(draft.get("training_tokens", 0))
    if tokens:
        draft.fields["train.tokens"] = tokens
    steps = tokens // batch
    _sparsity(draft, ours, steps, kwargs if isinstance(kwargs, Mapping) else {}, width)
    _optimiser(draft, steps, batch)
    draft.model(draft.get("model_name"))
    draft.layer(draft.get("hook_name"), draft.get("hook_layer"))
    _logging(draft, steps)
    if dataset := draft.get("dataset_path"):
        draft.note(f"dataset_path: {dataset}: proteins are named by embed.fasta")
    how = draft.get("normalize_activations", "none")
    if how != "expected_average_only_in":
        draft.note(f"normalize_activations: {how}: here one factor brings activations to mean square 1")
    return draft.finish()


def _sparsity(draft: Draft, ours: str, steps: int, kwargs: Mapping[str, Any], width: Any) -> None:
    for name in ("l1_warm_up_steps", "l0_warm_up_steps"):
        warmup = draft.get(name)
        if warmup is not None and steps and ours in ("relu_l1", "gated", "jumprelu"):
            draft.fields["train.sae.sparsity_warmup"] = share(warmup, steps)
    if ours in ("topk", "batch_topk", "matryoshka_batch_topk"):
        k = draft.get("k", kwargs.get("k", 100))
        draft.fields["train.sae.k"] = max(1, round(float(k)))
        if (aux := draft.get("aux_loss_coefficient")) is not None:
            draft.note(f"aux_loss_coefficient: {aux}: of another scale; train.sae.aux_coefficient stays at 1/32")
        draft.get("l1_coefficient")
        if (widths := draft.get("matryoshka_widths")) and ours == "matryoshka_batch_topk":
            ends = sorted({*map(int, widths), *([int(width)] if width else [])})
            draft.fields["train.sae.fractions"] = [(b - a) / ends[-1] for a, b in pairwise([0, *ends])]
        return
    draft.get("k")
    if ours == "jumprelu":
        draft.take("l0_coefficient", "train.sae.sparsity_coefficient", float)
        draft.get("l1_coefficient")
        if draft.get("jumprelu_sparsity_loss_mode") == "tanh":
            draft.fields["train.sae.penalty"] = "tanh"
            draft.take("jumprelu_tanh_scale", "train.sae.tanh_scale", float)
            draft.take("pre_act_loss_coefficient", "train.sae.pre_act_coefficient", float)
        draft.take("jumprelu_bandwidth", "train.sae.bandwidth", float)
        draft.take("jumprelu_init_threshold", "train.sae.theta_start", float)
        return
    draft.take("l1_coefficient", "train.sae.sparsity_coefficient", float)
    if (power := draft.get("lp_norm", 1.0)) != 1.0:
        draft.note(f"lp_norm: {power}: the penalty here is L1")


def _optimiser(draft: Draft, steps: int, batch: int) -> None:
    draft.take("lr", "train.lr", float)
    betas = draft.get("adam_beta1", 0.9), draft.get("adam_beta2", 0.999)
    draft.fields["train.betas"] = [float(beta) for beta in betas]
    draft.take("lr_warm_up_steps", "train.lr_warmup_steps", int)
    decay = draft.get("lr_decay_steps")
    if decay is not None and steps:
        draft.fields["train.lr_decay"] = share(decay, steps)
    schedule = draft.get("lr_scheduler_name", "constant")
    if schedule != "constant":
        draft.note(f"lr_scheduler_name: {schedule}: here the rate is constant between a warm-up and a linear decay")
    end = draft.get("lr_end")
    if end:
        draft.note(f"lr_end: {end}: the decay here ends at 0")
    if draft.get("autocast") is True:
        draft.fields["train.compute"] = "bfloat16"
    window = draft.get("dead_feature_window")
    if window:
        draft.fields["train.dead_tokens"] = int(window) * batch
    draft.take("seed", "train.seed", int)


def _logging(draft: Draft, steps: int) -> None:
    if draft.get("log_to_wandb") is True:
        draft.fields["wandb.mode"] = "online"
    draft.take("wandb_project", "wandb.project", str)
    draft.take("wandb_entity", "wandb.entity", str)
    draft.take("wandb_log_frequency", "train.log_every", int)
    checkpoints = int(draft.get("n_checkpoints", 0))
    if checkpoints and steps:
        draft.fields["train.checkpoint_every"] = max(1, steps // (checkpoints + 1))


def _flat(document: Mapping[str, Any]) -> dict[str, Any]:
    flat = {key: value for key, value in document.items() if key not in _PARTS}
    for part in _PARTS:
        inner = document.get(part)
        if isinstance(inner, Mapping):
            flat = {**flat, **{key: value for key, value in inner.items() if value is not None}}
    return flat
