"""What a key was meant to be: a neighbour misspelt, a key of another section, another tool's name."""

from __future__ import annotations

import difflib

from plmsae_cli.config.tree import entries, keys

# Names of other tools and of everyday speech -> ours.
RENAMED = {
    "aux_alpha": "train.sae.aux_coefficient",
    "auxk_alpha": "train.sae.aux_coefficient",
    "batch_size": "train.batch_tokens",
    "chunk_bytes": "optimize.chunk",
    "chunk_size": "optimize.chunk",
    "ckpt_every": "train.checkpoint_every",
    "clip_grad": "train.grad_clip",
    "context_size": "embed.max_length",
    "d_model": "train.plm.hidden_size",
    "d_sae": "train.sae.num_latents",
    "devices": "launch.gpus",
    "dict_size": "train.sae.num_latents",
    "endpoint": "storage.endpoint_url",
    "epochs": "train.tokens",
    "expansion_factor": "train.sae.expansion",
    "fasta_path": "embed.fasta",
    "gpu": "launch.gpus",
    "group_fractions": "train.sae.fractions",
    "hook_layer": "train.layer",
    "import": "embed.imported",
    "jumprelu_bandwidth": "train.sae.bandwidth",
    "jumprelu_init_threshold": "train.sae.theta_start",
    "l0": "train.sae.k",
    "l0_coefficient": "train.sae.sparsity_coefficient",
    "l1_alpha": "train.sae.sparsity_coefficient",
    "l1_coefficient": "train.sae.sparsity_coefficient",
    "l1_penalty": "train.sae.sparsity_coefficient",
    "learning_rate": "train.lr",
    "log_name": "name",
    "log_steps": "train.log_every",
    "mask_prob": "train.plm.mask_rate",
    "max_grad_norm": "train.grad_clip",
    "max_len": "embed.max_length",
    "max_seq_len": "embed.max_length",
    "max_steps": "train.tokens",
    "model_name": "model.weights",
    "model_name_or_path": "model.weights",
    "model_path": "model.weights",
    "n_experts": "train.sae.num_experts",
    "n_gpus": "launch.gpus",
    "n_latents": "train.sae.num_latents",
    "nproc_per_node": "launch.ranks",
    "num_epochs": "train.tokens",
    "num_gpus": "launch.gpus",
    "num_heads": "train.plm.num_attention_heads",
    "num_hidden_layers": "train.plm.num_layers",
    "num_steps": "train.tokens",
    "num_tokens": "train.tokens",
    "num_workers": "launch.workers",
    "optim": "train.optimizer",
    "out_dir": "root",
    "output_dir": "root",
    "precision": "train.compute",
    "run_name": "name",
    "save_dir": "root",
    "save_every": "train.checkpoint_every",
    "save_path": "root",
    "shard_size": "embed.shard",
    "sparsity": "train.sae.k",
    "sparsity_penalty": "train.sae.sparsity_coefficient",
    "steps": "train.tokens",
    "top_k": "train.sae.k",
    "topk": "train.sae.k",
    "wandb_project": "wandb.project",
    "warmup_steps": "train.lr_warmup_steps",
    "wd": "train.plm.weight_decay",
    "weights_path": "model.weights",
}


def suggestions(section: str, key: str) -> list[str]:
    """Dotted paths that `key`, written in `section` (`""` at the top), may have meant; often none."""
    word = key.lower().replace("-", "_").strip()
    siblings = keys(section)
    inside = f"{section}." if section else ""
    renamed = RENAMED.get(word)
    if renamed is not None:
        leaf = renamed.rpartition(".")[2]
        return [f"{inside}{leaf}" if leaf in siblings else renamed]
    leaves = {path: path.rpartition(".")[2] for path in entries()}
    # What only a search has is meant by nobody outside of it.
    leaves = {
        path: leaf for path, leaf in leaves.items() if section.startswith("sweep") or not path.startswith("sweep.")
    }
    found = [path for path, leaf in leaves.items() if leaf == word]
    # A key that another section has beats a neighbour that is only somewhat alike.
    longer = [key for key in siblings if key.startswith(f"{word}_")]  # `batch` for `batch_tokens`
    near = (
        longer
        if len(longer) == 1 and not found
        else difflib.get_close_matches(word, siblings, 1, 0.8 if found else 0.6)
    )
    if near:
        return [f"{inside}{near[0]}"]
    if not found:
        close = difflib.get_close_matches(word, sorted(set(leaves.values())), 1, 0.8)
        found = [path for path, leaf in leaves.items() if leaf in close]
    # The nearest sections first: `seed` under train.sae means train.seed, not shuffle.seed.
    best = max((_shared(section, path) for path in found), default=0)
    return [path for path in found if _shared(section, path) == best]


def unknown(section: str, key: str) -> tuple[str, list[str]]:
    """The hint for an unknown key, and the paths it names."""
    guesses = suggestions(section, key)
    if guesses:
        return f"did you mean {' or '.join(guesses)}?", guesses
    where = f"keys of {section}" if section else "keys at the top"
    return f"{where}: {', '.join(keys(section))}", []


def _shared(section: str, path: str) -> int:
    count = 0
    for mine, theirs in zip(section.split("."), path.split("."), strict=False):
        if mine != theirs:
            break
        count += 1
    return count
