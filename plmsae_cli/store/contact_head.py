"""The regression weights of ESM-2's contact head, which are published beside the models."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.pickles import read_pickle
from plmsae_cli.store.sources import ESM2_HEAD, ESM2_HEAD_URL
from plmsae_cli.store.weights import PUBLISHED, cache_folder

Head = tuple[torch.Tensor, torch.Tensor]
"""Weight [blocks x heads], bias []."""


def contact_head_file(weights: str, store: Store) -> Path | None:
    """The file that holds the contact head of `model.weights`; None where there is none.

    For a published name, `<name>-contact-regression.pt` in torch's hub folder or the cache's `weights`; for a `.pt` the
    file of that ending beside it; for a Hugging Face folder its model.safetensors, where that has the head.
    """
    if weights in PUBLISHED:
        places = [Path(torch.hub.get_dir()) / "checkpoints", cache_folder() / "weights"]
        return next((p / f"{weights}{ESM2_HEAD}" for p in places if (p / f"{weights}{ESM2_HEAD}").is_file()), None)
    if weights.endswith(".pt"):
        beside = f"{weights.removesuffix('.pt')}{ESM2_HEAD}"
        return store.local(beside) if store.exists(beside) else None
    whole = join(weights, "model.safetensors")
    if weights == "bundled" or not store.exists(whole):
        return None
    from safetensors import safe_open

    path = store.local(whole)
    with safe_open(path, "pt") as file:
        return path if any(name.endswith("contact_head.regression.weight") for name in file.keys()) else None  # noqa: SIM118


def load_contact_head(weights: str, store: Store, num_heads: int) -> Head:
    """The head of `model.weights`, which has `num_heads` heads over all its blocks.

    Raises:
        UserError: there is none, or it is another model's.
    """
    path = contact_head_file(weights, store)
    if path is None:
        name = weights if weights in PUBLISHED else "NAME"
        raise UserError(
            f"the contact head of {weights} is not here: its regression weights are a file of their own",
            f"download {ESM2_HEAD_URL}/{name}{ESM2_HEAD} and put it beside the weights "
            f"(published names: {cache_folder() / 'weights'}), or set eval.contacts.methods: [jacobian]",
        )
    state = _state(path)
    names = {key.rpartition(".")[2]: key for key in state if "contact_head.regression." in key}
    weight, bias = (state[names[key]].float().flatten() for key in ("weight", "bias"))
    if len(weight) != num_heads:
        raise UserError(
            f"{path}: the contact head is for {len(weight)} attention heads, the model has {num_heads}",
            "name the file of this model",
        )
    return weight, bias[0]


def _state(path: Path) -> dict[str, torch.Tensor]:
    if path.suffix != ".pt":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            wanted = [name for name in file.keys() if "contact_head" in name]  # noqa: SIM118
            return {name: file.get_tensor(name) for name in wanted}
    found = read_pickle(path, (argparse.Namespace,))
    state: dict[str, torch.Tensor] = found.get("model", found)
    if not any("contact_head.regression.weight" in name for name in state):
        raise UserError(f"{path} holds no contact_head.regression.weight", "fetch the file again")
    return state
