"""The strongest latents of proteins are those of a scan, ties to the lower number and the first residue."""

from __future__ import annotations

import pytest
import torch

from plmsae_cli.evaluation import strongest as module
from plmsae_cli.evaluation.families.largest import largest
from plmsae_cli.evaluation.strongest import strongest
from plmsae_cli.sae.interface import Latents


@pytest.mark.parametrize("pairs", [1 << 25, 2 * 12, 1])
def test_they_are_those_of_a_scan(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PAIRS", pairs)  # all four proteins at once, two, one
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([1, 7, 30, 2])
    rows, width, k = 40, 12, 3
    # Few distinct values, so that latents and residues tie; latent 5 has no maximum, as if it never fired in training.
    acts_RK = torch.randint(0, 4, (rows, k), generator=generator).float()
    index_RK = torch.stack([torch.randperm(width, generator=generator)[:k] for _ in range(rows)])
    maximum_N = torch.randint(1, 4, (width,), generator=generator).float()
    maximum_N[5] = 0.0
    found = strongest(Latents(acts_RK, index_RK), maximum_N, 4, lengths)
    best_PN = largest(Latents(acts_RK, index_RK), maximum_N, lengths)
    dense_RN = torch.zeros(rows, width).scatter_(1, index_RK, acts_RK)
    scale = [float(m) if m else 1.0 for m in maximum_N]
    begin = 0
    for p, length in enumerate(lengths.tolist()):
        mine_LN = dense_RN[begin : begin + length]
        peaks = [(float(mine_LN[:, n].max()) / scale[n], n) for n in range(width)]
        assert best_PN[p].tolist() == torch.tensor([share for share, _ in peaks]).half().tolist()
        for t, (share, n) in enumerate(sorted(peaks, key=lambda one: (-one[0], one[1]))[:4]):
            if share == 0:
                assert float(found.share_PT[p, t]) == 0
                continue
            assert (int(found.latent_PT[p, t]), float(found.share_PT[p, t])) == (n, torch.tensor(share).item())
            assert float(found.activation_PT[p, t]) == float(mine_LN[:, n].max())
            assert int(found.residue_PT[p, t]) == 1 + int(mine_LN[:, n].argmax())
        begin += length


def test_more_are_asked_for_than_there_are() -> None:
    found = strongest(Latents(torch.ones(2, 1), torch.tensor([[1], [1]])), torch.ones(3), 10, torch.tensor([2]))
    assert found.latent_PT.tolist() == [[1, 0, 2]]
    assert found.share_PT.tolist() == [[1.0, 0.0, 0.0]]
    assert found.residue_PT[0, 0] == 1
