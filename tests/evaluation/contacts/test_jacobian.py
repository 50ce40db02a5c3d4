"""The categorical Jacobian against its definition, and against couplings that were put in."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from plmsae_cli.evaluation.contacts.jacobian import coupling, jacobian, letter_logits
from plmsae_cli.evaluation.contacts.precision import precision
from plmsae_cli.plm.alphabet import CLS, EOS, VOCAB_SIZE, encode, pack
from plmsae_cli.plm.contacts import apc
from plmsae_cli.plm.esm2 import ESM2, ESM2Config
from plmsae_cli.plm.passes import ESM2Output

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tiny() -> ESM2:
    torch.manual_seed(0)
    model = ESM2(ESM2Config(num_layers=2, d=16, num_heads=2)).double().eval()
    model.init_weights(3)
    for parameter in model.parameters():  # livelier than at the start of a training
        parameter.data += 0.2 * torch.randn_like(parameter)
    return model


def by_definition(model: ESM2, sequence: str, layer: int, value: Any) -> torch.Tensor:
    """One forward pass a mutant, each term by itself."""
    letters = "LAGVSERTIDPKQNFYMHWC"

    def logits(text: str) -> torch.Tensor:
        packed = pack([encode(text)])
        splice = {} if value is None else {layer: lambda x: torch.cat([x[:1], value(x[1:-1]), x[-1:]])}
        with torch.no_grad():
            return model(packed.tokens_T, packed.documents, logits=True, splice=splice).logits[1:-1, 4:24]

    wild = logits(sequence)
    size = len(sequence)
    found = torch.zeros(size, 20, size, 20, dtype=torch.float64)
    for i in range(size):
        for a, letter in enumerate(letters):
            found[i, a] = logits(sequence[:i] + letter + sequence[i + 1 :]) - wild
    return found


def score_by_definition(j: torch.Tensor) -> np.ndarray[Any, Any]:
    x = j.double().numpy().copy()
    for axis in range(4):
        x -= x.mean(axis, keepdims=True)
    x = (x + x.transpose(2, 3, 0, 1)) / 2
    size = len(x)
    s = np.zeros((size, size))
    for i in range(size):
        for k in range(size):
            s[i, k] = 0.0 if i == k else np.sqrt((x[i, :, k] ** 2).sum())
    out = np.zeros_like(s)
    for i in range(size):
        for k in range(size):
            if i != k:
                out[i, k] = s[i, k] - s[i].sum() * s[:, k].sum() / s.sum()
    return out


@pytest.mark.parametrize("budget", [1, 40, 100_000])
@pytest.mark.parametrize("spliced", [False, True])
def test_it_is_what_one_pass_a_mutant_gives(tiny: ESM2, budget: int, spliced: bool) -> None:
    sequence = "MKXWAC"
    value = (lambda x: 0.5 * x.roll(1, -1)) if spliced else None
    found = jacobian(tiny, encode(sequence), 1, value, budget, CPU)
    wanted = by_definition(tiny, sequence, 1, value)
    assert wanted.abs().max() > 0.1
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5)
    np.testing.assert_allclose(coupling(found).numpy(), score_by_definition(wanted), atol=1e-5)


def test_blocks_of_rows_change_nothing(tiny: ESM2, monkeypatch: pytest.MonkeyPatch) -> None:
    found = jacobian(tiny, encode("MKXWACDE"), 1, None, 1000, CPU)
    whole = coupling(found.clone())
    monkeypatch.setattr("plmsae_cli.evaluation.contacts.jacobian._BLOCK_BYTES", 3 * 8 * 1600)
    torch.testing.assert_close(coupling(found.clone()), whole, rtol=0, atol=1e-12)


def test_the_identity_spliced_in_changes_no_bit(tiny: ESM2) -> None:
    plain = jacobian(tiny, encode("MKTWAC"), 1, None, 100, CPU)
    assert torch.equal(jacobian(tiny, encode("MKTWAC"), 1, torch.clone, 100, CPU), plain)
    assert not torch.equal(jacobian(tiny, encode("MKTWAC"), 1, torch.zeros_like, 100, CPU), plain)


def test_the_splice_leaves_the_ends_alone(tiny: ESM2) -> None:
    tokens = torch.tensor([[CLS, 5, 6, 7, EOS]], dtype=torch.uint8)
    seen = []

    def value(x_TD: torch.Tensor) -> torch.Tensor:
        seen.append(x_TD.clone())
        return torch.zeros_like(x_TD)

    letter_logits(tiny, tokens, 1, value)
    packed = pack([np.array([5, 6, 7], dtype=np.uint8)])
    mask = torch.tensor([True, False, False, False, True])[:, None]
    by_hand = tiny(packed.tokens_T, packed.documents, logits=True, splice={1: lambda x: x * mask}).logits
    torch.testing.assert_close(
        letter_logits(tiny, tokens, 1, torch.zeros_like)[0].double(), by_hand[1:-1, 4:24], rtol=0, atol=1e-5
    )


def test_apc_has_its_closed_form() -> None:
    # A product of row and column effects is what is taken away: nothing stays.
    a, b = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 5.0, 1.0])
    torch.testing.assert_close(apc(a[:, None] * b), torch.zeros(3, 3), rtol=0, atol=1e-6)
    s = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(apc(s), torch.tensor([[-0.5, 0.5], [0.5, -0.5]]))


class Planted(torch.nn.Module):
    """Logits of each residue: what its partner's layer 0 says, times a table; layer 0 holds the letter one-hot."""

    def __init__(self, pairs: list[tuple[int, int]], length: int) -> None:
        super().__init__()
        self.partner_L = torch.arange(length)
        for i, j in pairs:
            self.partner_L[i], self.partner_L[j] = j, i
        self.table = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))

    def forward(
        self, tokens_T: torch.Tensor, documents: Any, layers: Any = (), splice: Any = None, logits: bool = False
    ) -> ESM2Output:
        x_TV = torch.nn.functional.one_hot(tokens_T.long(), VOCAB_SIZE).float()
        for value in (splice or {}).values():
            x_TV = value(x_TV)
        whole = x_TV.view(-1, len(self.partner_L) + 2, VOCAB_SIZE)
        moved = whole.clone()
        moved[:, 1:-1] = whole[:, 1:-1][:, self.partner_L]
        return ESM2Output({}, (moved @ self.table).flatten(0, 1))


def test_planted_couplings_are_found_first_and_a_dictionary_that_drops_letters_loses_theirs() -> None:
    length = 60
    pairs = [(i, 59 - i) for i in range(12)]  # 59 to 37 apart: as many as L/5
    model = Planted(pairs, length)
    contact_LL = np.zeros((length, length), dtype=bool)
    for i, j in pairs:
        contact_LL[i, j] = contact_LL[j, i] = True
    known_L = np.ones(length, dtype=bool)
    residues = encode("".join("ACDEFGHIKLMNPQRSTVWY"[i % 20] for i in range(length)))

    def found(value: Any) -> dict[str, float]:
        return precision(coupling(jacobian(model, residues, 0, value, 5000, CPU)).numpy(), contact_LL, known_L)  # type: ignore[arg-type]

    original = found(None)
    assert original == {"L": 12 / 60, "L/2": 12 / 30, "L/5": 1.0}  # all twelve, first
    assert found(lambda x: 0.5 * x) == original  # a dictionary that keeps letters apart
    # Without letters nothing is coupled: of equal scores all choices count, so that is chance.
    chance = 12 / (36 * 37 / 2)
    assert found(torch.zeros_like) == pytest.approx(dict.fromkeys(("L", "L/2", "L/5"), chance))
