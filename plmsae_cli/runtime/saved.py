"""Opening what runs leave behind: trained dictionaries and datasets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.imported import ImportedSAE
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.export import from_state
from plmsae_cli.store.blocks import Blocks
from plmsae_cli.store.foreign import is_foreign
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.tensorfile import TensorFile


@dataclass(frozen=True)
class SavedSAE:
    """A trained dictionary that eats raw activations, and where it comes from."""

    model: Dictionary
    facts: dict[str, Any]
    """`layer`, `weights` (name, sha256), `tokens`, `dataset`, ...: the contents of sae.json."""


def load_sae_with_facts(run: str | Path, store: Store | None = None) -> SavedSAE:
    """The SAE of a run folder, or of its `sae/` folder.

    Raises:
        UserError: there is no exported SAE, or it was written by something else.
    """
    store = store or Store()
    folder, facts = _exported(run, store)
    file = TensorFile(store, join(folder, "sae.safetensors"))
    return SavedSAE(from_state({name: file.read(name) for name in file.names()}, facts["config"]).eval(), facts)


def read_sae_facts(run: str | Path, store: Store | None = None) -> dict[str, Any]:
    """The contents of sae.json, without the weights; raises as `load_sae_with_facts` does."""
    return _exported(run, store or Store())[1]


def _exported(run: str | Path, store: Store) -> tuple[str, dict[str, Any]]:
    """The folder of the exported SAE, and what sae.json says."""
    folder = str(run)
    if store.exists(join(folder, "sae", "sae.json")):
        folder = join(folder, "sae")
    path = join(folder, "sae.json")
    if not store.exists(path):
        raise UserError(f"{run} holds no trained SAE (no sae.json)", "name a run folder whose training has finished")
    facts = json.loads(store.read(path))
    if facts.get("format") != "plmsae.sae/1":
        raise UserError(
            f"{path}: format {facts.get('format')!r} is not plmsae.sae/1", "was it written by a newer plmsae?"
        )
    return folder, facts


def load_sae(run: str | Path, device: str | torch.device = "cpu") -> Dictionary:
    """The trained SAE of a run: `encode` raw activations [B, d] to latents, `decode` them back.

    Args:
        run: a run folder such as `runs/quickstart`, or the `sae/` folder inside it; or what `train.imported.path` may be, a
            dictionary of another project; local or `s3://`.
        device: where the model lives and its inputs must be, as torch names it: `cpu`, `cuda`, `cuda:1`.
    """
    from plmsae_cli.runtime.dictionaries import read_dictionary

    if is_foreign(str(run), Store()):
        return read_dictionary(ImportedSAE(path=str(run))).model.to(device)
    return load_sae_with_facts(run).model.to(device)


def open_blocks(folder: str | Path, store: Store | None = None) -> Blocks:
    """A shuffled dataset (`optimize-<key>`): `num_rows`, `d`, `dtype`, and `read_into(start, out_RD)`."""
    return Blocks(store or Store(), str(folder))
