"""How large things are in a smoke run."""

from __future__ import annotations

from typing import Any

STEPS = 8
MOST_TRIALS = 2
ROWS = 256  # rows of a batch and of a block
PACK = 512
PLM_BATCH = 2 * PACK  # one pack for each of the two ranks
WIDEST = 1024
MOST_ACTIVE = 8
MOST_EXPANSION = 4.0
MOST_EXPERTS = 4
MOST_OF_SAE = {
    "k_aux": 4 * MOST_ACTIVE,
    "k_start": 2 * MOST_ACTIVE,
    "target_l0": MOST_ACTIVE,
    "num_experts": MOST_EXPERTS,
}

SMALL_PLM = {
    "num_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "max_length": 128,
    "pack_tokens": PACK,
    "eval_every": STEPS // 2,
    "eval_tokens": 2048,
}
# Of a language model too, where they are larger: the same schedules within a few steps.
CAPPED_PLM = {
    "num_att_tokens": 16,
    "window": 32,
    "mask_rate_steps": STEPS // 2,
    "diffusion_warmup_steps": STEPS // 2,
    "muon_momentum_warmup_steps": STEPS // 2,
    "cooldown_steps": STEPS // 4,
}
SMALL_DATA = {
    "shuffle.memory": 8_000_000,
    "optimize.chunk": 1_000_000,
    "optimize.block_rows": ROWS,
    "embed.shard": 1_000_000,
}
SORTED_SHARD = 500_000  # of every layer of the bundled model, within shuffle.memory
# Axes that need annotated proteins or structures, of which the package has none.
ANNOTATED = ("concepts", "families", "probes", "encode", "contacts")
SMALL_LM = {"bin": None, "sequences": 16, "max_length": 128, "compute": "auto", "batch_tokens": 1024}
# Latents and positions of another dictionary may not exist in the small one.
SMALL_STEERING = {
    "latents": "densest",
    "top": 2,
    "residues": "all",
    "fasta": None,
    "proteins": 4,
    "esmfold": None,
    "recycles": None,
    "compute": "auto",
    "batch_tokens": "auto",
}
# Structures and ids are those of other proteins; the folding head of the smoke run is small and random.
SMALL_STRUCTURE: dict[str, Any] = {
    "structures": [],
    "references": None,
    "ids": None,
    "proteins": 2,
    "max_length": 64,
    "esmfold": "random",
    "recycles": 0,
    "tasks": 2,
}
SMALL_FEATURES = {"top": 5, "random": 5, "tasks": 2, "memory": 100_000_000, "batch_tokens": "auto"}
# A description is of a latent of another dictionary.
NO_ANSWERS = {"descriptions": None, "predictions": None}
EVERY = {"log_every": 1, "checkpoint_every": STEPS // 2}
