"""What other projects' own code makes of dictionaries, in a process of its own.

    python peers.py save FOLDER     random dictionaries of each, saved by themselves, with their latents in codes.safetensors
    python peers.py load FOLDER     SAELens loads every folder below it, and encodes x.safetensors

Their packages are imported without the tooling of language models that they import beside it.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, cast
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ABSENT = {
    "accelerate", "babe", "circuitsvis", "datasets", "huggingface_hub", "matplotlib", "nltk", "nnsight", "pandas", "plotly",
    "plotly_express", "requests", "tenacity", "transformer_lens", "transformers", "umap", "wandb", "h5py", "tqdm", "einops",
}  # fmt: skip


class Root(torch.nn.Module):
    """What SAELens asks of its base class."""

    def setup(self) -> None: ...


class Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for packages that a peer imports and its dictionaries do not use; asked first."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] in ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        stub = MagicMock(__name__=spec.name, HookPoint=torch.nn.Identity, HookedRootModule=Root)
        return cast(ModuleType, stub)

    def exec_module(self, module: ModuleType) -> None: ...


D, N, K = 8, 24, 4


def disturb(model: torch.nn.Module) -> None:
    """Random numbers for every parameter and threshold: starts are zeros and ties."""
    generator = torch.Generator().manual_seed(5)
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        drawn = torch.randn(tensor.shape, generator=generator)
        if name == "threshold":
            tensor.data = drawn.abs() / 2 + 0.1
        elif tensor.is_floating_point() and name not in ("decoder.weight", "activation_rescale_factor"):
            tensor.data = drawn / (1 + (tensor.ndim > 1))


def measured(model: Any, x: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        latents = model.encode(x)
        return {"latents": latents, "reconstruction": model.decode(latents)}


def save_learning(root: Path, x: Tensor) -> None:
    module = importlib.import_module("dictionary_learning.dictionary")
    trainers = {n: importlib.import_module(f"dictionary_learning.trainers.{n}") for n in ("top_k", "batch_top_k")}
    matryoshka = importlib.import_module("dictionary_learning.trainers.matryoshka_batch_top_k")
    made = [
        module.AutoEncoder(D, N),
        module.AutoEncoderNew(D, N),
        module.GatedAutoEncoder(D, N),
        module.JumpReluAutoEncoder(D, N),
        trainers["top_k"].AutoEncoderTopK(D, N, K),
        trainers["batch_top_k"].BatchTopKSAE(D, N, K),
        matryoshka.MatryoshkaBatchTopKSAE(D, N, K, [4, 8, 12]),
    ]
    for model in made:
        disturb(model)
        folder = root / "dictionary_learning" / type(model).__name__
        folder.mkdir(parents=True)
        torch.save(model.state_dict(), folder / "ae.pt")
        (folder / "config.json").write_text(json.dumps({"trainer": {"dict_class": type(model).__name__}}))
        save_file({"x": x, **measured(model, x)}, folder / "codes.safetensors")


def save_saelens(root: Path, x: Tensor) -> None:
    import sae_lens as lens

    for centred in (True, False):
        common = {"d_in": D, "d_sae": N, "apply_b_dec_to_input": centred}
        made = {
            "standard": lens.StandardSAE(lens.StandardSAEConfig(**common)),
            "gated": lens.GatedSAE(lens.GatedSAEConfig(**common)),
            "jumprelu": lens.JumpReLUSAE(lens.JumpReLUSAEConfig(**common)),
            "topk": lens.TopKSAE(lens.TopKSAEConfig(**common, k=K)),
            "topk-by-length": lens.TopKSAE(lens.TopKSAEConfig(**common, k=K, rescale_acts_by_decoder_norm=True)),
        }
        for name, model in made.items():
            disturb(model)
            folder = root / "sae_lens" / f"{name}-{'centred' if centred else 'as-is'}"
            model.save_model(folder)
            save_file({"x": x, **measured(model, x)}, folder / "codes.safetensors")


def load_saelens(root: Path) -> None:
    from sae_lens import SAE

    x = load_file(root / "x.safetensors")["x"]
    for config in sorted(root.glob("*/cfg.json")):
        save_file(measured(SAE.load_from_disk(config.parent), x), root / f"{config.parent.name}.safetensors")


if __name__ == "__main__":
    verb, place = sys.argv[1], Path(sys.argv[2])
    sys.meta_path.insert(0, Absent())
    rows = torch.randn(50, D, generator=torch.Generator().manual_seed(1))
    if verb == "save":
        save_learning(place, rows)
        save_saelens(place, rows)
    else:
        load_saelens(place)
