"""A layer replaced at residues."""

from __future__ import annotations

import torch
from torch import Tensor

from plmsae_cli.plm.passes import Splice


def at_residues(residue_T1: Tensor, value: Splice) -> Splice:
    """`value` at residues; `<cls>` and `<eos>` as they are."""
    return lambda x_TD: torch.where(residue_T1, value(x_TD).to(x_TD.dtype), x_TD)
