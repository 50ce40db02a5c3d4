"""Masked language modelling: what is masked, the loss against fair-esm's model, gradients over packs."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import esm
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from plmsae_cli.config.experiment import Train
from plmsae_cli.config.plm import PLM
from plmsae_cli.evaluation.language import score
from plmsae_cli.plm.alphabet import AMINO_ACIDS, CLS, EOS, FIRST_LETTER, MASK, PAD, Packed, encode, pack, wrap
from plmsae_cli.plm.attention import Documents
from plmsae_cli.runtime.dist import Gang
from plmsae_cli.runtime.masked_scores import mask, masks_of_pack
from plmsae_cli.runtime.models import build_model
from plmsae_cli.training.masking import IGNORED, corrupt
from plmsae_cli.training.packs import Packs
from plmsae_cli.training.plm_model import parameter_groups
from plmsae_cli.training.plm_objective import PLMObjective

PACK_TOKENS = 256
PACKS_A_STEP = 3
SEED = 5


def proteins(count: int, seed: int, longest: int = 90) -> list[str]:
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list(AMINO_ACIDS + "X"), rng.integers(2, longest))) for _ in range(count)]


def packs(count: int, seed: int, order: int | None = SEED, pack_tokens: int = PACK_TOKENS) -> Packs:
    shard = np.concatenate([wrap(encode(s)) for s in proteins(count, seed)])
    return Packs([shard], pack_tokens, 92, order)


def options(**changes: Any) -> Train:
    """A small model, three packs a step."""
    plm = {
        "fasta": "none.fasta", "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "max_length": 90,
        "pack_tokens": PACK_TOKENS, "eval_every": 2, "eval_tokens": 4 * PACK_TOKENS, "corruption": "mask",
    }  # fmt: skip
    plm |= changes.pop("plm", {})
    return Train.model_validate(
        {
            "kind": "plm", "plm": PLM.model_validate(plm), "batch_tokens": PACKS_A_STEP * PACK_TOKENS, "seed": SEED,
            "lr": 1e-3, "lr_warmup_steps": 0, "grad_clip": None, **changes,
        }
    )  # fmt: skip


def objective(compute: torch.dtype = torch.float32, **changes: Any) -> PLMObjective:
    """That model on random proteins."""
    valid = {"random": packs(60, 2, None)}
    return PLMObjective(options(**changes), packs(150, 1), valid, 10, Gang(), torch.device("cpu"), compute)


# What is corrupted


@pytest.fixture(scope="module")
def many() -> Packed:
    """A pack of 400,000 tokens: long documents, a tail of padding, every letter of the alphabet."""
    letters = np.array([*encode(AMINO_ACIDS + "XBUZO")])
    rng = np.random.default_rng(0)
    documents = [rng.choice(letters, 1000).astype(np.uint8) for _ in range(380)]
    return pack(documents, num_tokens=400_000, max_len=1002)


def within(count: int, total: int, rate: float) -> None:
    """A binomial count is within four deviations of its mean."""
    assert abs(count - total * rate) < 4 * math.sqrt(total * rate * (1 - rate)), f"{count / total} is not {rate}"


@pytest.mark.parametrize("corruption", ["mask", "bert"])
@pytest.mark.parametrize("rate", [0.15, 0.4])
def test_targets_are_the_chosen_residues_and_no_other_token(many: Packed, corruption: str, rate: float) -> None:
    inputs_T, targets_T = corrupt(many.tokens_T, many.residue_mask_T, rate, corruption, 7, 3)
    chosen_T = targets_T != IGNORED
    tokens_T = many.tokens_T.long()
    within(int(chosen_T.sum()), int(many.residue_mask_T.sum()), rate)
    assert not (chosen_T & ~many.residue_mask_T).any()
    assert not torch.isin(targets_T, torch.tensor([CLS, EOS, PAD, MASK])).any()
    assert torch.equal(targets_T[chosen_T], tokens_T[chosen_T])
    assert torch.equal(inputs_T[~chosen_T], tokens_T[~chosen_T])
    if corruption == "mask":
        assert (inputs_T[chosen_T] == MASK).all()


def test_bert_masks_80_replaces_10_and_keeps_10_percent(many: Packed) -> None:
    inputs_T, targets_T = corrupt(many.tokens_T, many.residue_mask_T, 0.15, "bert", 7, 3)
    chosen_T = targets_T != IGNORED
    # Where the truth is no standard residue, a random amino acid always differs from it: the fates are told apart.
    odd_T = chosen_T & (many.tokens_T >= FIRST_LETTER + len(AMINO_ACIDS))
    fates = inputs_T[odd_T]
    masked, kept = fates == MASK, fates == targets_T[odd_T]
    replaced = ~masked & ~kept
    for share, rate in ((masked, 0.8), (replaced, 0.1), (kept, 0.1)):
        within(int(share.sum()), len(fates), rate)
    counts = torch.bincount(fates[replaced] - FIRST_LETTER, minlength=20)
    assert len(counts) == 20, "replacements are the 20 amino acids"
    for count in counts.tolist():
        within(count, int(replaced.sum()), 1 / 20)
    # Over all residues a replacement hits the truth once in twenty.
    within(int((inputs_T[chosen_T] == MASK).sum()), int(chosen_T.sum()), 0.8)


def test_masks_are_a_function_of_the_keys(many: Packed) -> None:
    def chosen(*keys: int) -> torch.Tensor:
        return corrupt(many.tokens_T, many.residue_mask_T, 0.15, "bert", *keys)[1] != IGNORED

    first = chosen(0, 1)
    assert torch.equal(first, chosen(0, 1))
    residues = int(many.residue_mask_T.sum())
    for other in (chosen(0, 2), chosen(1, 1), chosen(1, 0)):
        within(int((first & other).sum()), residues, 0.15**2)


# The loss


def documents_of(tokens_T: torch.Tensor, packed: Packed) -> list[torch.Tensor]:
    """A pack's real documents, one tensor each."""
    edges = packed.cu_seqlens.tolist()
    real = [(a, b) for a, b in pairwise(edges) if b > a and packed.tokens_T[a] != PAD]
    return [tokens_T[a:b] for a, b in real]


def peer_scores(model: torch.nn.Module, corrupted: list[tuple[Packed, torch.Tensor, torch.Tensor]]) -> list[float]:
    """(mean cross-entropy, accuracy, number) over the targets, by fair-esm's model in float64 on a padded batch."""
    config = model.config
    peer = esm.model.esm2.ESM2(config.num_layers, config.d, config.num_heads)  # type: ignore[arg-type,union-attr]
    loaded = peer.load_state_dict(model.state_dict(), strict=False)
    assert {name.split(".")[0] for name in loaded.missing_keys} <= {"contact_head", "lm_head", "layers"}
    peer = peer.double().eval()
    inputs = [d for p, inputs_T, _ in corrupted for d in documents_of(inputs_T, p)]
    targets = [d for p, _, targets_T in corrupted for d in documents_of(targets_T, p)]
    batch_BL = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True, padding_value=PAD)
    target_BL = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORED)
    with torch.no_grad():
        logits_BLV = peer(batch_BL)["logits"]
    chosen = target_BL != IGNORED
    log_p = logits_BLV[chosen] - logits_BLV[chosen].exp().sum(-1, keepdim=True).log()
    truth = target_BL[chosen]
    loss = -log_p.gather(1, truth[:, None]).mean()
    return [float(loss), float((log_p.argmax(-1) == truth).double().mean()), len(truth)]


def corrupted_packs(
    source: Packs, numbers: range, seed: int, corruption: str
) -> list[tuple[Packed, torch.Tensor, torch.Tensor]]:
    made = [(n, source.pack(n)) for n in numbers]
    return [(p, *corrupt(p.tokens_T, p.residue_mask_T, 0.15, corruption, seed, n)) for n, p in made]


@pytest.mark.parametrize("corruption", ["mask", "bert"])
def test_the_loss_is_fair_esms_over_the_global_batch(corruption: str) -> None:
    one = objective(plm={"corruption": corruption})
    for step in range(2):
        batch = corrupted_packs(packs(150, 1), range(3 * step, 3 * step + 3), SEED, corruption)
        loss, accuracy, _ = peer_scores(one.model, batch)
        figures = one.step(step)
        assert float(figures["loss"]) == pytest.approx(loss, rel=2e-6)
        assert float(figures["accuracy"]) == pytest.approx(accuracy, abs=1e-6)


def test_validation_is_fair_esms_on_fixed_masks_whatever_the_step() -> None:
    one = objective(plm={"corruption": "bert"})
    assert one.validate(3) == {}
    figures = one.validate(2)
    assert one.validate(8) == figures
    source = packs(60, 2, None)
    assert source.epoch_packs(0) > 4, "eval_tokens must cut"
    batch = []
    for packed in map(source.pack, range(4)):
        masked_T, tokens_T = masks_of_pack(packed, 0.15), packed.tokens_T.long()
        batch.append((packed, mask(tokens_T, masked_T), tokens_T.masked_fill(~masked_T, IGNORED)))
    loss, accuracy, count = peer_scores(one.model, batch)
    found = figures["random"]
    assert found["loss"] == pytest.approx(loss, rel=2e-6)
    assert found["accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
    assert found["residues"] == count
    one.step(0)
    assert one.validate(2)["random"]["loss"] != found["loss"], "it reads the model's present weights"


def test_validation_is_the_estimator_of_eval_lm() -> None:
    """At 15 % of the residues, whatever training masks."""
    one = objective(plm={"mask_rate": 0.4})
    one._valid = {"all": packs(12, 2, None)}
    found = one.validate(2)["all"]
    other = score(one.model, [encode(s) for s in proteins(12, 2)], 0.15, 500, torch.float32).figures()
    assert other is not None
    assert found.pop("loss") == pytest.approx(other.pop("loss"), rel=1e-6)
    assert found.pop("perplexity") == pytest.approx(other.pop("perplexity"), rel=1e-5)
    assert found == other


def test_a_unet_is_scored_in_the_arithmetic_it_is_trained_in() -> None:
    """In bfloat16 too, where autocast would round at other places; its blocks are made to write into the stream."""
    unet = {"architecture": "unet", "hidden_size": 64, "window": None}
    one = objective(torch.bfloat16, plm=unet)
    with torch.no_grad():
        for name, parameter in one.model.named_parameters():
            if name.endswith(("out_DD", "down_DF")):
                parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(0))
    one._valid = {"all": packs(12, 2, None)}
    found = one.validate(2)["all"]
    read = build_model(one.config)
    read.load_state_dict(one.model.state_dict())
    other = score(read, [encode(s) for s in proteins(12, 2)], 0.15, 500, torch.bfloat16).figures()
    assert other is not None
    assert other["loss"] == pytest.approx(found["loss"], rel=1e-6)
    assert other["accuracy"] == found["accuracy"]


def test_validation_and_what_is_saved_are_of_the_average_and_training_goes_on_without_it() -> None:
    averaged, plain = objective(plm={"ema": 0.5}), objective()
    expected = {name: p.detach().clone() for name, p in plain.model.named_parameters()}
    for step in range(3):
        averaged.step(step)
        plain.step(step)
        for name, p in plain.model.named_parameters():
            expected[name] = 0.5 * expected[name] + 0.5 * p.detach()
    found = averaged.validate(4)
    plain.model.load_state_dict(expected, strict=False)
    assert found["random"]["loss"] == pytest.approx(plain.validate(4)["random"]["loss"], rel=1e-5)
    released = averaged.released()
    for name, tensor in expected.items():
        torch.testing.assert_close(released[name], tensor)

    peer = objective()
    for step in range(3):
        peer.step(step)
    for name, p in peer.model.named_parameters():
        assert torch.equal(dict(averaged.model.named_parameters())[name], p)


def test_a_validation_set_without_proteins_is_left_out() -> None:
    one = objective()
    one._valid = {"tiny": Packs([wrap(encode("M"))], PACK_TOKENS, 92, None), "none": Packs([], PACK_TOKENS, 92, None)}
    found = one.validate(2)
    assert (list(found), found["tiny"]["residues"]) == (["tiny"], 1)


def test_validation_sees_as_far_as_training_does_and_at_the_end_everything() -> None:
    one = objective(plm={"architecture": "unet", "window": 8})
    with torch.no_grad():
        for name, parameter in one.model.named_parameters():
            if name.endswith(("out_DD", "down_DF")):
                parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(0))
    source = packs(60, 2, None)
    for step, near in ((2, 8), (10, None)):
        loss, count = 0.0, 0
        for packed in map(source.pack, range(4)):
            masked_T, tokens_T = masks_of_pack(packed, 0.15), packed.tokens_T.long()
            with torch.no_grad():
                read = one.model(mask(tokens_T, masked_T), packed.documents, logits=True, window=near)  # type: ignore[call-arg]
            loss += float(F.cross_entropy(read.logits[masked_T].double(), tokens_T[masked_T], reduction="sum"))
            count += int(masked_T.sum())
        assert one.validate(step)["random"]["loss"] == pytest.approx(loss / count, rel=1e-5), step


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_a_batch_of_several_packs_each(world: int) -> None:
    """Together the packs that one rank would take, with the same masks."""

    def made(gang: Gang) -> PLMObjective:
        options_ = options(batch_tokens=6 * PACK_TOKENS)
        return PLMObjective(options_, packs(150, 1), {}, 10, gang, torch.device("cpu"), torch.float32)

    whole = made(Gang())
    for step in range(2):
        expected = [pack.inputs_T.tolist() for pack in whole._load(step)]
        found = [pack.inputs_T.tolist() for rank in range(world) for pack in made(Gang(rank, world))._load(step)]
        assert len(expected) == 6
        assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("plm", [{}, {"architecture": "unet"}], ids=str)
def test_gradients_of_several_packs_are_those_of_one_large_pack(plm: dict[str, Any]) -> None:
    one = objective(plm=plm)
    with torch.no_grad():
        for parameter in one.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    model = one.model
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    one.step(0)
    accumulated = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    parts = corrupted_packs(packs(150, 1), range(3), SEED, "mask")
    inputs_T = torch.cat([inputs for _, inputs, _ in parts])
    targets_T = torch.cat([targets for _, _, targets in parts])
    lengths = tuple(length for p, _, _ in parts for length in p.lengths)
    edges = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    model.load_state_dict(initial, strict=False)
    model.zero_grad()
    logits = model(inputs_T, Documents(edges, max(lengths), lengths), logits=True).logits
    F.cross_entropy(logits, targets_T, ignore_index=IGNORED).backward()
    assert accumulated.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(accumulated[name], parameter.grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"moments": "bfloat16"}, {"optimizer": "muon"}, {"optimizer": "signum"},
        {"optimizer": "muon", "lr": "auto", "plm": {"architecture": "unet", "ema": 0.9, "objective": "masked_diffusion"}},
    ],
    ids=str,
)  # fmt: skip
def test_saved_state_continues_bit_for_bit(changes: dict[str, Any]) -> None:
    one, other = objective(**{"grad_clip": 1.0, **changes}), objective(**{"grad_clip": 1.0, **changes})
    for step in range(3):
        one.step(step)
    saved = {name: tensor.clone() for name, tensor in one.tensors().items()}
    expected = [one.step(step) for step in range(3, 6)]
    other.load(saved)
    found = [other.step(step) for step in range(3, 6)]
    for a, b in zip(expected, found, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)
    first, second = one.tensors(), other.tensors()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_weight_decay_is_on_matrices_alone() -> None:
    names = objective().tensors()
    groups = {group.name: group for group in parameter_groups(objective().model, options())}
    decayed = {name for group in groups.values() if group.weight_decay for name in group.parameters}
    model = objective().model
    assert decayed == {n for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n}
    held = {n.split(".", 2)[2].rpartition(".")[0] for n in names if n.startswith("optimizer.")}
    assert held == dict(model.named_parameters()).keys()


def test_rates_of_roles_are_their_own_else_the_rate_of_all_else_the_architectures() -> None:
    def rates(**changes: Any) -> dict[str, float]:
        one = options(**changes)
        groups = parameter_groups(objective().model, one)
        return {group.name: group.lr_scale for group in groups if "vectors" not in group.name}

    assert rates(optimizer="muon", lr="auto") == {"embed": 1e-3, "hidden": 0.02, "scalar": 1e-3, "head": 1e-3}
    own = {"lr_embed": 0.5}
    assert rates(optimizer="muon", lr=0.3, plm=own) == {"embed": 0.5, "hidden": 0.3, "scalar": 0.3, "head": 0.3}
    assert set(rates(optimizer="signum", lr="auto").values()) == {1e-4}


def test_muon_has_the_matrices_and_adam_the_embedding() -> None:
    one = objective(optimizer="muon")
    muons = {n.split(".", 2)[2].rpartition(".")[0] for n in one.tensors() if n.endswith(".momentum")}
    adams = {n.split(".", 2)[2].rpartition(".")[0] for n in one.tensors() if n.endswith(".exp_avg")}
    matrices = {n for n, p in one.model.named_parameters() if p.ndim == 2}
    assert muons == matrices - {"embed_tokens.weight", "lm_head.dense.weight"}
    assert adams == dict(one.model.named_parameters()).keys() - muons


def test_flops_are_three_times_the_products_of_a_forward() -> None:
    """As torch counts them, for documents of one length that fill the pack."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    shard = np.concatenate([wrap(encode("M" * 30))] * (PACK_TOKENS // 32))
    one = objective(plm={"hidden_size": 64})
    one._packs = Packs([shard], PACK_TOKENS, 92, None)
    assert one._packs.mean_context == 32
    packed = one._packs.pack(0)
    # Attention in products, since the counter knows no other form of it on a CPU.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as trunk:
            rope = one._trained.rope(len(packed.tokens_T), packed.documents)
            x_TD = one._trained.trunk(packed.tokens_T, packed.documents, rope, None)
        with FlopCounterMode(display=False) as head:
            one._trained.head(x_TD)
    needed = trunk.get_total_flops() + 0.15 * head.get_total_flops()
    assert one.flops_per_step() == pytest.approx(3 * PACKS_A_STEP * needed, rel=1e-12)


def test_context_is_the_mean_over_tokens() -> None:
    shard = np.concatenate([wrap(encode("A" * n)) for n in (8, 28)])  # 10 and 30 tokens
    assert Packs([shard], 64, 64, None).mean_context == (10 * 10 + 30 * 30) / 40
