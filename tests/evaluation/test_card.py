"""The model card: figures stand with their intervals, and what was not measured is absent."""

from __future__ import annotations

from typing import Any

from plmsae_cli.evaluation.card import model_card

MANIFEST = {"weights": {"name": "esm2_t6_8M_UR50D", "sha256": "ab" * 32}, "rows": 1000}
FACTS = {"tokens": 2000}


def metrics(**axes: Any) -> dict[str, Any]:
    return {"layer": 3, "demo": False, "architecture": "topk", "num_latents": 64, "k": 4, **axes}


def fidelity(**more: Any) -> dict[str, Any]:
    figures = {"fvu": 0.2, "interval_fvu": [0.1, 0.3], "l0_mean": 4.0, "dead_share": 0.5, "heldout_rows": 1234}
    return {**figures, **more}


def test_losses_stand_with_their_intervals_and_absent_shares_leave_their_cell_empty() -> None:
    side = {"ce": 2.5, "ce_sae": 2.6, "ce_zero": 3.5, "ce_mean": 2.5, "kl": 0.05}
    masked = {**side, "recovered_zero": 0.9, "interval_recovered_zero": [0.85, 0.934]}
    loss = {"proteins": 20, "masked": masked, "unmasked": side}
    lines = model_card(metrics(fidelity=fidelity(loss=loss)), MANIFEST, FACTS).splitlines()
    assert "FVU 0.200 [0.100, 0.300], mean L0 4.0," in lines
    assert "| masked | 2.500 | 2.600 | 3.500 | 2.500 | 0.0500 | 90.0 % [85.0, 93.4] |  |" in lines
    assert "| unmasked | 2.500 | 2.600 | 3.500 | 2.500 | 0.0500 |  |  |" in lines
    assert "on 20 held-out proteins" in "\n".join(lines)
    plain = model_card(metrics(fidelity=fidelity()), MANIFEST, FACTS)
    assert "Cross-entropy" not in plain
    assert "## Concepts" not in plain


def test_intervals_of_contacts_and_structures_are_shown_where_there_are_several() -> None:
    one = {"original": 0.5, "sae": 0.4, "zero": 0.1, "recovered": 0.75}
    several = {**one, "interval_sae": [0.3, 0.45], "interval_recovered": [0.6, 0.8]}
    contacts = {"proteins": [{}], "in_training": 0, "chance": 0.02, "methods": {"jacobian": {"L": one, "L/2": several}}}
    card = model_card(metrics(contacts=contacts), MANIFEST, FACTS)
    assert "| jacobian | L | 0.500 | 0.400 | 0.100 | 75.0 % |" in card
    assert "| jacobian | L/2 | 0.500 | 0.400 [0.300, 0.450] | 0.100 | 75.0 % [60.0, 80.0] |" in card
    fold = {"mode": "isolated", "variant": "k", "number": 8, "rmsd": 3.25, "interval_rmsd": [2.9, 3.5], "tm": 0.9}
    structure = {"proteins": 2, "esmfold": "x", "references": 0, "in_training": 0, "demo": False, "folds": [fold]}
    card = model_card(metrics(structure=structure), MANIFEST, FACTS)
    assert "| isolated | k 8 | 3.25 [2.90, 3.50] | 0.900 |  |  |  |" in card
