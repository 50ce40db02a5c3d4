"""A run's dictionary as a folder that SAELens loads with `SAE.load_from_disk`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from plmsae_cli.config.errors import UserError
from plmsae_cli.runtime.dictionaries.saelens_reading import LAYER
from plmsae_cli.runtime.saved import SavedSAE
from plmsae_cli.sae.batch_topk import BatchTopK
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.export import to_state
from plmsae_cli.sae.gated import Gated
from plmsae_cli.sae.jumprelu import JumpReLU
from plmsae_cli.sae.relu_l1 import ReLUL1
from plmsae_cli.sae.topk import TopK
from plmsae_cli.store.foreign import SAELENS
from plmsae_cli.store.fs import Store
from plmsae_cli.store.tensorfile import write_tensors

CONFIG, WEIGHTS = SAELENS
VERSION = "6.54.12"
"""Of SAELens, whose format this is; it reads folders of its versions 2 to 5 otherwise."""


def write_saelens(saved: SavedSAE, folder: Path) -> list[str]:
    """Write the folder and give the names of its files.

    Args:
        folder: new or empty.

    Raises:
        UserError: SAELens has no such architecture, or the folder holds something already.
    """
    kind, more, options = _counterpart(saved.model)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder", "name a new folder")
    folder.mkdir(parents=True, exist_ok=True)
    model = saved.model
    tensors = {"W_enc": model.w_enc_ND.T, "W_dec": model.w_dec_ND, "b_dec": model.b_dec_D, **more}
    write_tensors(Store(), str(folder / WEIGHTS), {n: t.detach().contiguous() for n, t in tensors.items()})
    about = {
        "architecture": kind,
        "d_in": model.d,
        "d_sae": model.num_latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **options,
        "metadata": _metadata(saved.facts),
    }
    (folder / CONFIG).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_card(saved, kind), encoding="utf-8")
    return sorted([CONFIG, WEIGHTS, "README.md"])


def _counterpart(model: Dictionary) -> tuple[str, Mapping[str, Tensor], Mapping[str, Any]]:
    """SAELens' architecture, its further tensors and its further settings."""
    bias = {"b_enc": model.b_enc_N}
    if isinstance(model, BatchTopK):  # which SAELens stores so, too
        return "jumprelu", {**bias, "threshold": model.theta.expand(model.num_latents)}, {}
    if isinstance(model, TopK):
        return "topk", bias, {"k": model.k, "rescale_acts_by_decoder_norm": False}
    if isinstance(model, JumpReLU):
        return "jumprelu", {**bias, "threshold": model.log_theta_N.exp()}, {}
    if isinstance(model, Gated):
        return "gated", {"b_gate": model.b_enc_N, "r_mag": model.r_mag_N, "b_mag": model.b_mag_N}, {}
    if isinstance(model, ReLUL1):
        return "standard", bias, {}
    raise UserError(
        f"SAELens has no architecture like {to_state(model)[1]['architecture']}",
        "sae/sae.safetensors holds its weights",
    )


def _metadata(facts: Mapping[str, Any]) -> dict[str, Any]:
    layer = facts["layer"]
    # transformers' name of what puts out the layer; the last one's comes after the final LayerNorm.
    hook = "embeddings" if layer == 0 else f"encoder.layer.{layer - 1}"
    if layer == facts.get("num_layers"):
        hook = "encoder.emb_layer_norm_after"
    return {
        "sae_lens_version": VERSION,
        "sae_lens_training_version": None,
        "model_name": (facts.get("weights") or {}).get("name"),
        "hook_name": hook,
        LAYER: layer,
    }


def _card(saved: SavedSAE, kind: str) -> str:
    name = (saved.facts.get("weights") or {}).get("name", "imported activations")
    lines = [
        f"# Sparse autoencoder of {name}, layer {saved.facts['layer']}",
        "",
        f"{to_state(saved.model)[1]['architecture']}, {saved.model.num_latents:,} latents of width {saved.model.d}, "
        f"written by plmsae in SAELens' format ({kind}). It takes raw activations: layer k is the residual stream after",
        "block k, the last one after the final LayerNorm.",
        "",
        "```python",
        "from sae_lens import SAE",
        "",
        'sae = SAE.load_from_disk("THIS_FOLDER")',
        "latents = sae.encode(activations)",
        "```",
    ]
    return "\n".join(lines) + "\n"
