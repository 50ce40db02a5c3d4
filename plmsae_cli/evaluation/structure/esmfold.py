"""ESMFold (Lin et al., Science 2023) as transformers has it: found, loaded, and asked for one protein at a time."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from plmsae_cli.config.errors import UserError, first_line
from plmsae_cli.evaluation.contacts.structure import atoms_of
from plmsae_cli.plm.alphabet import TOKEN_NAMES
from plmsae_cli.runtime.device import pick_device
from plmsae_cli.runtime.hub.esm import esm_config, esm_state
from plmsae_cli.runtime.models import load_plm
from plmsae_cli.store.digests import remembered_sha256
from plmsae_cli.store.encoders import hide_broken_torchvision, quietly
from plmsae_cli.store.fs import Store
from plmsae_cli.store.weights import cache_folder, load_state, resolve_weights

RANDOM = "random"
"""Instead of weights: a small folding head with random ones on `model.weights`, to try everything out."""
_CA = 1
"""Place of CA among the 14 atoms of a residue, and among the 37."""
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_EXTRA = "pip install 'plmsae[fold]'"
_SMALL_HEAD = {
    "fp16_esm": False,
    "lddt_head_hid_dim": 16,
    "trunk": {
        "num_blocks": 1, "sequence_state_dim": 32, "pairwise_state_dim": 16, "sequence_head_width": 16,
        "pairwise_head_width": 8, "position_bins": 8, "max_recycles": 1, "chunk_size": None,
        "structure_module": {
            "sequence_dim": 32, "pairwise_dim": 16, "ipa_dim": 8, "resnet_dim": 16, "num_heads_ipa": 2, "num_qk_points": 2,
            "num_v_points": 2, "num_blocks": 2, "num_resnet_blocks": 1,
        },
    },
}  # fmt: skip


@dataclass(frozen=True)
class Fold:
    """One prediction for L residues."""

    alpha_L3: npt.NDArray[np.float64]
    """CA atoms, in angstrom."""
    plddt_L: npt.NDArray[np.float64]
    """Predicted lDDT of CA, 0 to 100."""
    output: Any
    """What transformers gave."""


class ESMFold:
    """The model on this process's device; its language model in half precision on a GPU, as published."""

    def __init__(self, model: Any, recycles: int | None) -> None:
        self.device = pick_device()
        model.esm.to(torch.float32 if self.device.type == "cpu" else torch.float16)
        if recycles is not None:  # transformers counts the first pass
            model.trunk.config.max_recycles = recycles + 1
        self.model = model.eval().to(self.device)

    @property
    def trunk(self) -> Any:
        """Its language model, transformers' `EsmModel`."""
        return self.model.esm

    @torch.inference_mode()
    def fold(self, sequence: str) -> Fold:
        """Predict; what `splicing.spliced` holds open applies."""
        output = self.model.infer(sequence)
        alpha_L3 = output["positions"][-1][0, :, _CA].double().cpu().numpy()
        return Fold(alpha_L3, 100.0 * output["plddt"][0, :, _CA].double().cpu().numpy(), output)

    def pdb(self, fold: Fold) -> str:
        """The prediction as a PDB file, pLDDT in the place of B factors."""
        return str(self.model.output_to_pdb(fold.output)[0])

    def atoms(self, fold: Fold) -> Any:
        """The prediction as Biotite's array of atoms."""
        return atoms_of(self.pdb(fold))


def folding_class() -> Any:
    """transformers' `EsmForProteinFolding`. Raises UserError with the line that installs what is missing."""
    hide_broken_torchvision()
    try:
        import_module("tmtools")
        from transformers.models.esm.modeling_esmfold import EsmForProteinFolding
    except ImportError as error:
        raise UserError(f"folding does not work here: {first_line(error)}", _EXTRA) from error
    return EsmForProteinFolding


def identity(esmfold: str, weights: str, store: Store, field: str) -> str:
    """A hash that stands for the folding model.

    Raises:
        UserError: naming `field`, where its weights are not on this machine; where a package that folding needs is not installed.
    """
    for package in ("transformers", "tmtools", "biotite"):
        if find_spec(package) is None:
            raise UserError(f"folding does not work here: {package} is not installed", _EXTRA)
    if esmfold == RANDOM:
        return f"{RANDOM}-{resolve_weights(weights, store, download=False).sha256}"
    return "-".join(remembered_sha256(file, cache_folder()) for file in _weight_files(_folder(esmfold, field), field))


def load(esmfold: str, weights: str, store: Store, recycles: int | None, layer: int, field: str) -> ESMFold:
    """The folding model, its language model checked to be `model.weights`.

    Args:
        esmfold: a folder, a name in the Hugging Face cache, or `random`.
        weights: `model.weights`, of which the dictionary is.
        layer: that of the dictionary; weights of the block that ends there are compared.
    """
    name = folding_class()
    if esmfold == RANDOM:
        return ESMFold(_random(name, weights, store), recycles)
    folder = _folder(esmfold, field)
    _weight_files(folder, field)
    try:
        model = quietly(lambda: name.from_pretrained(folder, local_files_only=True), str(folder))
    except UserError as error:
        raise UserError(
            error.message.replace("model.weights", field), "is the folder whole, and an ESMFold?"
        ) from error
    _require_same(model.esm, weights, store, layer, field, esmfold)
    return ESMFold(model, recycles)


_shared: dict[tuple[str, str, int | None, int], ESMFold] = {}


def shared(esmfold: str, weights: str, store: Store, recycles: int | None, layer: int, field: str) -> ESMFold:
    """The process's one instance, as `load` gives it: pieces that follow one another read 8 GB once."""
    key = (esmfold, weights, recycles, layer)
    if key not in _shared:
        _shared.clear()
        _shared[key] = load(esmfold, weights, store, recycles, layer, field)
    return _shared[key]


def _folder(esmfold: str, field: str) -> Path:
    local = Path(esmfold).expanduser()
    if local.is_dir():
        return local
    try:
        return Path(import_module("huggingface_hub").snapshot_download(esmfold, local_files_only=True))
    except ImportError as error:
        raise UserError(f"{field}: folding needs transformers", "pip install 'plmsae[fold]'") from error
    except Exception as error:  # a name that is none, or not in the cache
        raise UserError(
            f"{field}: {esmfold} is no folder, and not in the local Hugging Face cache",
            "name a folder that exists"
            if esmfold.startswith(("/", ".", "~"))
            else f"fetch it once with `hf download {esmfold}`, or name a folder",
        ) from error


def _weight_files(folder: Path, field: str) -> list[Path]:
    for pattern in _WEIGHTS:
        if files := sorted(folder.glob(pattern)):
            return files
    raise UserError(f"{field}: {folder} holds no weights ({' or '.join(_WEIGHTS)})", "is the folder whole?")


def _require_same(trunk: Any, weights: str, store: Store, layer: int, field: str, esmfold: str) -> None:
    """Raises UserError where the folding model reads another language model than the dictionary's."""
    info = resolve_weights(weights, store)
    shape = {"num_layers": trunk.config.num_hidden_layers, "d": trunk.config.hidden_size}
    for what, found in shape.items():
        if found != info.config.get(what):
            raise UserError(
                f"{field}: the language model in {esmfold} has {what} {found}, {info.name} has {info.config.get(what)}",
                "a dictionary is folded by the ESMFold that reads its own model: esm2_t36_3B_UR50D for facebook/esmfold_v1",
            )
    ours = load_state(info)[f"layers.{max(layer, 1) - 1}.fc1.weight"].float()
    theirs = trunk.encoder.layer[max(layer, 1) - 1].intermediate.dense.weight.detach().float().cpu()
    if float((ours - theirs).norm() / ours.norm()) > 0.01:  # rounding to half precision is 2e-4
        raise UserError(
            f"{field}: the language model in {esmfold} has the shape of {info.name}, but other weights",
            "set model.weights to the model that it was made from",
        )


def _random(name: Any, weights: str, store: Store) -> Any:
    from transformers.models.esm.configuration_esm import EsmConfig

    info = resolve_weights(weights, store)
    about = esm_config(info.config, 1024) | {"is_folding_model": True, "esmfold_config": _SMALL_HEAD}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = name(EsmConfig(**about, vocab_list=list(TOKEN_NAMES)))
        for parameter in (*model.trunk.parameters(), *model.lddt_head.parameters(), *model.esm_s_mlp.parameters()):
            if parameter.dim() == 2:  # some start at zero, where nothing would depend on the input
                torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    state = esm_state(dict(load_plm(info, store).state_dict()), info.config)
    inner = {key.removeprefix("esm."): tensor for key, tensor in state.items() if key.startswith("esm.")}
    model.esm.load_state_dict(inner)
    return model
