"""The two architectures as training sees them: a trunk, a head, and parameters by their role."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from plmsae_cli.config.plm import PLM
from plmsae_cli.config.training import Train
from plmsae_cli.plm.attention import Documents
from plmsae_cli.plm.cost import Config
from plmsae_cli.plm.esm2 import ESM2Config
from plmsae_cli.plm.gradients import taken
from plmsae_cli.plm.rotary import Tables
from plmsae_cli.plm.unet import UNet
from plmsae_cli.plm.unet_config import UNetConfig
from plmsae_cli.runtime.dist import Gang
from plmsae_cli.runtime.models import arithmetic, build_model
from plmsae_cli.training.masking import Masked
from plmsae_cli.training.optimizers import Group, GroupedMuon, Optimizer, build_optimizer

PEAK = {"adam": 1e-3, "muon": 1e-3, "signum": 1e-4}
"""`lr: auto`. Signs want a third to a tenth of Adam's (Chen et al. 2023, arXiv 2302.06675)."""
MUON_PEAK = {
    "esm2": {"hidden": 0.02},
    "unet": {"hidden": 0.05, "embed": 0.06, "head": 0.008, "scalar": 0.04},
}
"""`lr: auto` with `optimizer: muon`, by role; of the UNet those of the published speed runs."""
MUON_MOMENTUM = 0.95
COMPILE_MODE: str | None = None
"""torch.compile's `mode` for the trunk; `benchmarks/plm.py --mode` measures others."""


def plm_config(plm: PLM) -> Config:
    """The shape that the options describe."""
    if plm.architecture == "esm2":
        return ESM2Config(plm.num_layers, plm.hidden_size, plm.num_attention_heads)
    return UNetConfig(
        plm.num_layers,
        plm.hidden_size,
        plm.num_attention_heads,
        expansion_ratio=plm.expansion_ratio,
        soft_logit_cap=plm.soft_logit_cap,
        attention_soft_cap=plm.attention_soft_cap,
        tie_embeddings=plm.tie_embeddings,
        unet=plm.unet,
        value_embeddings=plm.value_embeddings,
        mask_embedding=plm.mask_embedding,
        num_att_tokens=plm.num_att_tokens if plm.p_attention else None,
    )


class Passes(NamedTuple):
    """What a training step compiles."""

    trunk: Callable[..., Tensor]
    """`TrainedModel.trunk`."""
    predict: Callable[..., tuple[Tensor, Tensor]]
    """`TrainedModel.predict`."""


class TrainedModel:
    """A model on its device, with float32 parameters and products in `compute`."""

    def __init__(self, config: Config, seed: int, device: torch.device, compute: torch.dtype) -> None:
        self.config, self._compute = config, compute
        self.model = build_model(config)
        self.model.init_weights(seed)
        self.model.to(device)

    def arithmetic(self) -> AbstractContextManager[object]:
        """Around forward passes."""
        return arithmetic(self.model, self._compute)

    def rope(self, num_tokens: int, documents: Documents) -> Tables:
        """The rotary tables of a pack's tokens."""
        tables: Tables = self.model.rotary(documents.locate(num_tokens)[1])
        return tables

    def trunk(self, tokens_T: Tensor, documents: Documents, rope: Tables, window: int | None) -> Tensor:
        """The last layer [T, D]."""
        if isinstance(self.model, UNet):
            return self.model.trunk(tokens_T, documents, rope, window)
        last = self.model.config.num_layers
        return self.model(tokens_T, documents, layers=(last,), rope=rope).hidden[last]  # type: ignore[no-any-return]

    def head(self, rows_MD: Tensor) -> Tensor:
        """Logits [M, V] of rows of the last layer."""
        return self.model.head(rows_MD)

    def predict(self, rows_MD: Tensor, targets_M: Tensor, weights_M: Tensor) -> tuple[Tensor, Tensor]:
        """What `score` gives, from rows of the last layer."""
        logits_MV = self.head(rows_MD).float()
        losses_M = F.cross_entropy(logits_MV, targets_M, reduction="none")
        hits_M = (logits_MV.argmax(-1) == targets_M) & (weights_M > 0)
        return (losses_M * weights_M).sum(), hits_M.sum()

    @property
    def passes(self) -> Passes:
        """Without the compiler."""
        return Passes(self.trunk, self.predict)

    def last_layer(self, pack: Masked, window: int | None, passes: Passes) -> Tensor:
        """[M, D] at the pack's places; within `arithmetic`."""
        documents = pack.documents.tiled(len(pack.inputs_T))
        rope = self.rope(len(pack.inputs_T), documents)
        return taken(passes.trunk(pack.inputs_T, documents, rope, window), pack.places_M)

    def score(self, pack: Masked, window: int | None, passes: Passes) -> tuple[Tensor, Tensor]:
        """(weighted sum of cross-entropies in nats, number of correct predictions) over the chosen residues."""
        with self.arithmetic():
            return passes.predict(self.last_layer(pack, window, passes), pack.targets_M, pack.weights_M)


def compiled_passes(trained: TrainedModel) -> Passes:
    """The passes compiled, the trunk once for training and validation: without gradients it would be another graph."""
    compiled = torch.compile(trained.trunk, dynamic=False, mode=COMPILE_MODE)

    def trunk(*pack: Any) -> Tensor:
        with torch.enable_grad():
            x_TD: Tensor = compiled(*pack)
        return x_TD if torch.is_grad_enabled() else x_TD.detach()

    return Passes(trunk, torch.compile(trained.predict))


def train_flops(config: Config, context: float, predicted: float) -> float:
    """Operations a token of forward and backward; see `UNetConfig.train_flops`."""
    if isinstance(config, UNetConfig):
        return config.train_flops(context, predicted)
    d, layers = config.d, config.num_layers
    return 6 * (layers * config.block_matrices + predicted * (d * d + config.vocab * d)) + 12 * layers * d * context


def role(name: str, ndim: int) -> str:
    """`embed`, `head`, `hidden` (the blocks' matrices) or `scalar` (all that is no matrix)."""
    if name.startswith(("embed_tokens", "embedding_VD", "value_tables")):
        return "embed"
    if name.startswith("lm_head"):
        return "head"
    return "hidden" if ndim >= 2 else "scalar"


def peak_rate(options: Train, kind: str) -> float:
    """Peak learning rate of a role."""
    plm = options.plm
    assert plm is not None
    own: float | str = {"hidden": plm.lr_hidden, "embed": plm.lr_embed, "head": plm.lr_head, "scalar": plm.lr_scalar}[
        kind
    ]
    if not isinstance(own, str):
        return own
    if options.lr != "auto":
        return options.lr
    muons = MUON_PEAK[plm.architecture] if options.optimizer == "muon" else {}
    return muons.get(kind, PEAK[options.optimizer])


def parameter_groups(model: torch.nn.Module, options: Train) -> list[Group]:
    """The parameters by role, those of the head by whether they are matrices: vectors do not decay.

    `lr_scale` is the role's peak rate, so that a step's rate is the schedule, in 0 to 1.
    """
    assert options.plm is not None
    found: dict[str, dict[str, torch.nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        kind = role(name, parameter.ndim)
        found.setdefault(f"{kind}_vectors" if kind == "head" and parameter.ndim < 2 else kind, {})[name] = parameter
    decay = {"hidden": options.plm.weight_decay, "head": options.plm.weight_decay}
    return [
        Group(name, own, decay.get(name, 0.0), peak_rate(options, name.partition("_")[0]), linear_maps=name == "hidden")
        for name, own in found.items()
    ]


def plm_optimizer(groups: Sequence[Group], options: Train, gang: Gang) -> Optimizer:
    """`train.optimizer` for a language model: `muon` is `GroupedMuon`, the others as for dictionaries."""
    assert options.plm is not None
    if options.optimizer != "muon":
        return build_optimizer(options, groups)
    momentum = MUON_MOMENTUM if options.momentum == "auto" else options.momentum
    betas = (options.betas[0], options.betas[1])
    warmup = options.plm.muon_momentum_warmup_steps
    return GroupedMuon(groups, momentum, warmup, betas, options.eps, gang, compiles=options.compile)


def optimizer_table(groups: Sequence[Group], options: Train) -> dict[str, str]:
    """Of each group: what updates how many parameters, at which peak rate and decay."""
    table = {}
    for group in groups:
        muon = options.optimizer == "muon" and group.linear_maps
        name = options.optimizer if muon or options.optimizer != "muon" else "adam"
        count = sum(p.numel() for p in group.parameters.values())
        decay = f"weight decay {group.weight_decay:g}" if group.weight_decay else "no weight decay"
        table[f"parameters_{group.name}"] = f"{count:,} by {name}, lr {group.lr_scale:g}, {decay}"
    return table
