"""Which files make a dictionary of another project."""

from __future__ import annotations

from plmsae_cli.config.errors import UserError
from plmsae_cli.store.fs import Store, join

SAELENS = ("cfg.json", "sae_weights.safetensors")
PICKLES = (".pt", ".ckpt")
_USUAL = "ae.pt"
_SETTINGS = ("config.json", "config.yaml")


def is_foreign(path: str, store: Store) -> bool:
    """Whether `path` looks like such a dictionary."""
    return path.endswith(PICKLES) or any(store.exists(join(path, name)) for name in (SAELENS[0], _USUAL))


def files_of(path: str, store: Store) -> list[str]:
    """The file of weights, then those of settings; of SAELens two.

    Raises:
        UserError: there is none.
    """
    weights, parent = (path, path.rpartition("/")[0] or ".") if path.endswith(PICKLES) else (join(path, _USUAL), path)
    config, tensors = (join(path, name) for name in SAELENS)
    if store.exists(config) and store.exists(tensors):
        return [tensors, config]
    if not store.exists(weights):
        raise UserError(
            f"there is no dictionary at {path}",
            f"name a folder with {' and '.join(SAELENS)}, or with {_USUAL}, or a .pt or .ckpt file",
        )
    beside = () if path.endswith(".ckpt") else _SETTINGS
    return [weights, *(file for name in beside if store.exists(file := join(parent, name)))]
