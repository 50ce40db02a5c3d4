"""How faithful a dictionary is: on held-out activations, and to the language model that reads them.

Loss recovered (Bricken et al. 2023, Templeton et al. 2024): the reconstruction replaces layer k at residue positions, the later
layers are computed anew, and (CE_ablated - CE_sae) / (CE_ablated - CE) says how much of the loss survives; the ablation is zero
or the dataset's mean. Scored on masked residues with fixed masks, and on unmasked inputs for comparison with InterPLM.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from plmsae_cli.evaluation.proteins import groups
from plmsae_cli.evaluation.splices import at_residues
from plmsae_cli.plm.alphabet import Packed, encode, pack
from plmsae_cli.plm.esm2 import ESM2
from plmsae_cli.plm.passes import Splice
from plmsae_cli.plm.unet import UNet
from plmsae_cli.runtime.device import pick_device
from plmsae_cli.runtime.masked_scores import mask, masks_of_pack
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.fidelity import Fidelity
from plmsae_cli.store.activations import ActivationShards

BOOTSTRAPS = 1000
_ENDS = torch.tensor([0.025, 0.975], dtype=torch.float64)


@dataclass(frozen=True)
class Reconstruction:
    """What a pass over held-out rows tells."""

    figures: Fidelity
    activation_N: torch.Tensor
    """Each latent's summed activation."""
    top_row_N: torch.Tensor
    """The first row at which each latent is largest; -1 where it never fired."""
    sums_5P: torch.Tensor
    """By protein: rows, squared error, squared distance from the mean, cosine and L0, summed."""


@torch.inference_mode()
def reconstruction(
    model: Dictionary,
    shards: ActivationShards,
    lengths_P: torch.Tensor,
    mean_D: torch.Tensor,
    batch: int = 4096,
) -> Reconstruction:
    """Stream held-out rows of raw activations, of proteins with so many rows, through the dictionary."""
    device = pick_device()
    model = model.to(device)
    figures = Fidelity(model.num_latents, device)
    activation_N = torch.zeros(model.num_latents, dtype=torch.float64, device=device)
    top_row_N = torch.full((model.num_latents,), -1, dtype=torch.int64, device=device)
    rows = int(lengths_P.sum())
    protein_R = torch.arange(len(lengths_P)).repeat_interleave(lengths_P)
    sums_5P = torch.zeros(5, len(lengths_P), dtype=torch.float64, device=device)
    for start in range(0, rows, batch):
        x_BD = shards.read(start, min(start + batch, rows), device)
        latents = model.encode(x_BD)
        before_N = figures.maximum_N.clone()
        figures_5B = figures.update(x_BD, model.decode(latents), latents, mean_D.to(device))
        sums_5P.index_add_(1, protein_R[start : start + len(x_BD)].to(device), figures_5B)
        activation_N.scatter_add_(0, latents.indices_BK.flatten(), latents.acts_BK.flatten().double())
        grown_BK = (latents.acts_BK == figures.maximum_N[latents.indices_BK]) & (
            latents.acts_BK > before_N[latents.indices_BK]
        )
        row_B1 = torch.arange(start, start + len(x_BD), device=device)[:, None]
        place_BK = torch.where(grown_BK, row_B1, rows)
        first_N = torch.full_like(top_row_N, rows)
        first_N.scatter_reduce_(0, latents.indices_BK.flatten(), place_BK.flatten(), "amin")
        top_row_N = torch.where(first_N < rows, first_N, top_row_N)
    return Reconstruction(figures, activation_N.cpu(), top_row_N.cpu(), sums_5P.cpu())


def reconstruction_intervals(sums_5P: torch.Tensor) -> dict[str, list[float]]:
    """95 % bootstrap intervals over proteins of FVU, cosine and L0, from `Reconstruction.sums_5P`."""
    count_Q, error_Q, variance_Q, cosine_Q, l0_Q = _resampled(sums_5P)
    drawn = {"fvu": error_Q / variance_Q, "cosine": cosine_Q / count_Q, "l0_mean": l0_Q / count_Q}
    return {f"interval_{name}": torch.quantile(values_Q, _ENDS).tolist() for name, values_Q in drawn.items()}


def _resampled(table_VP: torch.Tensor) -> torch.Tensor:
    """Sums [V, draws] over proteins drawn with replacement: residues of one protein are not independent.

    One draw at a time: all would be a thousand times the proteins.
    """
    generator = torch.Generator().manual_seed(0)
    count = table_VP.shape[1]
    draws = [table_VP[:, torch.randint(count, (count,), generator=generator)].sum(1) for _ in range(BOOTSTRAPS)]
    return torch.stack(draws, dim=1)


@dataclass(frozen=True)
class Sums:
    """Per protein: scored residues, and summed cross-entropy (nats) by variant, and KL(original || spliced)."""

    residues: torch.Tensor
    """[P]"""
    ce: dict[str, torch.Tensor]
    """`original`, `sae`, `zero`, `mean` -> [P]"""
    kl: torch.Tensor
    """[P]"""


@torch.inference_mode()
def loss_recovered(
    plm: ESM2 | UNet,
    sae: Dictionary,
    layer: int,
    mean_D: torch.Tensor,
    sequences: Sequence[str],
    mask_rate: float,
    batch_tokens: int,
    progress: Callable[..., None],
    check_stop: Callable[[], None],
) -> dict[str, Any]:
    """Cross-entropies with the original, the reconstruction and both ablations spliced in at `layer`.

    Returns:
        `masked` and `unmasked`: CE by variant in nats a residue, recovered_zero, recovered_mean with 95 % bootstrap
        intervals over proteins (each left out where it is not finite), KL; `spliced_identity`: `exact` if splicing the
        identity changed no bit of the logits.
    """
    device = pick_device()
    plm, sae, mean_D = plm.to(device), sae.to(device), mean_D.to(device)
    batches = _batches(sequences, batch_tokens)
    found: dict[str, list[Sums]] = {"masked": [], "unmasked": []}
    identity = True
    for done, chosen in enumerate(batches):
        check_stop()
        packed = pack([encode(sequences[i]) for i in chosen])
        masked_T = masks_of_pack(packed, mask_rate).to(device)
        packed = packed.to(device)
        splices = _splices(sae, mean_D, packed)
        found["masked"].append(_score(plm, layer, splices, packed, mask(packed.tokens_T, masked_T), masked_T))
        found["unmasked"].append(_score(plm, layer, splices, packed, packed.tokens_T.long(), packed.residue_mask_T))
        if done == 0:
            plain = plm(packed.tokens_T, packed.documents, logits=True).logits
            state = plm.below(packed.tokens_T, packed.documents, layer)
            same = plm.head(plm.above(state, state.x_TD.clone()))
            identity = torch.equal(plain, same)
        progress(done + 1, len(batches), unit="batches")
    result: dict[str, Any] = {side: _summary(sums) for side, sums in found.items()}
    return {"proteins": len(sequences), "spliced_identity": "exact" if identity else "differs", **result}


def _batches(sequences: Sequence[str], budget: int) -> list[list[int]]:
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    return [[order[place] for place in places] for places in groups([len(sequences[i]) + 2 for i in order], budget)]


def _splices(sae: Dictionary, mean_D: torch.Tensor, packed: Packed) -> dict[str, Splice | None]:
    """What each variant puts at residue positions; <cls> and <eos> are left as they are."""
    residue_T1 = packed.residue_mask_T[:, None]
    return {
        "original": None,
        "sae": at_residues(residue_T1, lambda x_TD: sae(x_TD.float())),
        "zero": at_residues(residue_T1, torch.zeros_like),
        "mean": at_residues(residue_T1, lambda x_TD: mean_D.expand_as(x_TD)),
    }


def _score(
    plm: ESM2 | UNet,
    layer: int,
    splices: dict[str, Splice | None],
    packed: Packed,
    inputs_T: torch.Tensor,
    scored_T: torch.Tensor,
) -> Sums:
    targets = packed.tokens_T.long()[scored_T]
    document_T, _ = packed.documents.locate(packed.tokens_T.shape[0])
    owner = document_T[scored_T]
    count = len(packed.lengths)

    def per_protein(values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(count, dtype=torch.float64, device=values.device).index_add_(0, owner, values.double())

    log_p: dict[str, torch.Tensor] = {}
    ce = {}
    state = plm.below(inputs_T, packed.documents, layer)
    for name, splice in splices.items():
        last_TD = plm.above(state, state.x_TD if splice is None else splice(state.x_TD))
        chosen = F.log_softmax(plm.head(last_TD[scored_T]).double(), dim=-1)  # in float32 a small KL is all rounding
        if name in ("original", "sae"):
            log_p[name] = chosen
        ce[name] = per_protein(F.nll_loss(chosen, targets, reduction="none")).cpu()
    kl = (log_p["original"].exp() * (log_p["original"] - log_p["sae"])).sum(-1)
    return Sums(per_protein(torch.ones_like(kl)).cpu(), ce, per_protein(kl).cpu())


def recovered(ce: float, ce_sae: float, ce_ablated: float) -> float:
    """Share of the ablation's damage that the reconstruction avoids: 1 is perfect, 0 no better than the ablation.

    NaN where the ablation does no damage.
    """
    return 1.0 - (ce_sae - ce) / (ce_ablated - ce) if ce_ablated != ce else float("nan")


def _summary(parts: Sequence[Sums]) -> dict[str, Any]:
    residues_P = torch.cat([p.residues for p in parts])
    ce_P = {name: torch.cat([p.ce[name] for p in parts]) for name in parts[0].ce}
    kl_P = torch.cat([p.kl for p in parts])
    total = float(residues_P.sum())
    ce = {name: float(values.sum()) / total for name, values in ce_P.items()}
    sums_VR = _resampled(torch.stack([residues_P, *ce_P.values()]))
    drawn = {name: sums_R / sums_VR[0] for name, sums_R in zip(ce_P, sums_VR[1:], strict=True)}
    result: dict[str, Any] = {
        "residues": int(total),
        "ce": ce["original"],
        "ce_sae": ce["sae"],
        "ce_zero": ce["zero"],
        "ce_mean": ce["mean"],
        "kl": float(kl_P.sum()) / total,
    }
    for ablation in ("zero", "mean"):
        # Where an ablation costs nothing there is no share to state, and JSON has no NaN: the figure is left out.
        if math.isfinite(share := recovered(ce["original"], ce["sae"], ce[ablation])):
            result[f"recovered_{ablation}"] = share
        spread_R = 1.0 - (drawn["sae"] - drawn["original"]) / (drawn[ablation] - drawn["original"])
        ends = torch.quantile(spread_R, _ENDS).tolist()
        if all(math.isfinite(end) for end in ends):
            result[f"interval_recovered_{ablation}"] = ends
    return result
