"""What each axis of `eval` computes, once at full tensor shapes on this machine's device: seconds and peak memory.

    python benchmarks/eval_full_shapes.py                      # ESM-2 650M with random weights, 1280 x 10,240 latents, k 64
    python benchmarks/eval_full_shapes.py --device cpu --small # the same code on small shapes

`rows` embeds and encodes proteins of Swiss-Prot's lengths; `fidelity` reconstructs them and measures the loss recovered;
`concepts` counts, chooses and scores; `families` takes largest activations and patterns, and matches 50,000 proteins with 500
classes; `probes` fits one target; `encode` lists each protein's strongest latents. Needs torch, numpy and safetensors, and a
folder for the weights while it runs. Nothing is written as Parquet.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import HERE, add, cpu, stamp

from plmsae_cli.evaluation.concepts.choice import choose
from plmsae_cli.evaluation.concepts.counts import Counts
from plmsae_cli.evaluation.concepts.labelling import Labelled, instance_ranks, totals
from plmsae_cli.evaluation.concepts.scoring import PairScores
from plmsae_cli.evaluation.concepts.vocabulary import Concept, Labels
from plmsae_cli.evaluation.families.largest import largest
from plmsae_cli.evaluation.families.matching import match, tile_latents
from plmsae_cli.evaluation.families.patterns import Patterns
from plmsae_cli.evaluation.fidelity import loss_recovered
from plmsae_cli.evaluation.probes.fits import CANDIDATES
from plmsae_cli.evaluation.probes.logistic import Sparse, fit_all, fit_each, promising
from plmsae_cli.evaluation.proteins import groups
from plmsae_cli.evaluation.rows import encode_rows, group_residues
from plmsae_cli.evaluation.strongest import strongest
from plmsae_cli.plm.alphabet import AMINO_ACIDS
from plmsae_cli.plm.esm2 import ESM2, PUBLISHED, ESM2Config
from plmsae_cli.runtime.embedding import Embedder
from plmsae_cli.runtime.peak import peak_memory
from plmsae_cli.sae.fidelity import Fidelity
from plmsae_cli.sae.interface import Latents
from plmsae_cli.sae.topk import TopK
from plmsae_cli.store.fs import Store
from plmsae_cli.store.weights import save_model

CONCEPTS, CLASSES = 476, 500


class Timed:
    """`with timed("axis")`: seconds and peak memory of what is inside, printed and kept."""

    def __init__(self, device: torch.device, about: dict[str, str], name: str = "eval/full-shapes") -> None:
        self.device, self.about = device, {"name": name, **about}
        self.lines: list[dict[str, Any]] = []

    @contextmanager
    def __call__(self, axis: str, note: str) -> Iterator[None]:
        cuda = self.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        begun = time.perf_counter()
        yield
        if cuda:
            torch.cuda.synchronize()
        spent = time.perf_counter() - begun
        peak = torch.cuda.max_memory_allocated() if cuda else peak_memory()
        line = {**self.about, "who": f"plmsae {axis}", "value": round(spent, 2), "unit": "s"}
        self.lines.append({**line, "note": f"{note}; peak {peak / 2**30:.1f} GiB"})
        print(f"{axis:12} {spent:8.2f} s   peak {peak / 2**30:5.1f} GiB   {note}", flush=True)


def proteins(residues: int) -> list[str]:
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.6, 0.6, residues // 100 + 2), 30, 1022).astype(np.int64)
    lengths = lengths[: int(np.searchsorted(np.cumsum(lengths), residues)) + 1]
    return ["".join(rng.choice(list(AMINO_ACIDS), int(length))) for length in lengths]


def labels(sequences: list[str]) -> tuple[Labelled, list[Concept]]:
    """Every concept on a stretch of some proteins, half of them scored by residue."""
    rng = np.random.default_rng(1)
    concepts = [Concept(f"c{c}", "kind", c % 2 == 0) for c in range(CONCEPTS)]
    number = 4 * len(sequences)
    protein = rng.integers(len(sequences), size=number)
    length = np.array([len(s) for s in sequences])[protein]
    start = (rng.random(number) * length).astype(np.int64)
    stop = np.minimum(start + 1 + rng.integers(40, size=number), length)
    found = Labels(tuple(concepts), protein, rng.integers(CONCEPTS, size=number), start, stop, np.arange(number))
    return Labelled(found, sequences, np.arange(len(sequences), dtype=np.uint64), amino_acids=False), concepts


def concept_test(made: list[tuple[list[int], Latents]], sae: TopK, sequences: list[str], device: torch.device) -> None:
    labelled, concepts = labels(sequences)
    rank_C = torch.from_numpy(instance_ranks(concepts))
    counted = [Counts(sae.num_latents, CONCEPTS, int((rank_C >= 0).sum()), device) for _ in range(2)]
    for place, (mine, latents) in enumerate(made):
        counted[place % 2].add(latents, sae.maximum_N, labelled.batch(mine, device))
    for counts in counted:
        counts.at_least()
    halves = [[p for place, (mine, _) in enumerate(made) if place % 2 == half for p in mine] for half in (0, 1)]
    both = [totals(labelled, half) for half in halves]
    total_CH = torch.from_numpy(np.stack([np.where(rank_C >= 0, t[1], t[0]) for t in both], 1)).to(device)

    def chunks() -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        for c in range(CONCEPTS):
            hits = torch.stack([counts.hits_CNT[c : c + 1] for counts in counted], 1)
            rank = int(rank_C[c])
            found = hits if rank < 0 else torch.stack([q.instances_CNT[rank : rank + 1] for q in counted], 1)
            yield c, hits, found

    best = choose(chunks(), torch.stack([c.fired_NT for c in counted]), total_CH, torch.ones(CONCEPTS))
    pairs = PairScores(best.latent_C, best.threshold_C, sae.maximum_N, rank_C, len(sequences))
    for place, (mine, latents) in enumerate(made):
        if place % 2:
            lengths = torch.tensor([len(sequences[p]) for p in mine])
            owner_R = torch.tensor(mine).repeat_interleave(lengths).to(device)
            pairs.add(latents, labelled.batch(mine, device), owner_R)


def family_test(made: list[tuple[list[int], Latents]], sae: TopK, sequences: list[str], many: int) -> None:
    """Largest activations and patterns of the proteins; then a matching of `many` made-up ones."""
    device = sae.maximum_N.device
    patterns = Patterns(sae.num_latents, device)
    for mine, latents in made:
        lengths = torch.tensor([len(sequences[p]) for p in mine])
        patterns.add(latents, sae.maximum_N, lengths)
        largest(latents, sae.maximum_N, lengths)
    patterns.classes()
    generator = torch.Generator(device).manual_seed(0)
    y_PL = torch.rand(many, CLASSES, generator=generator, device=device) < 0.01
    test_P = torch.rand(many, generator=generator, device=device) < 0.5
    tile = tile_latents(many, CLASSES, 20)
    for first in range(0, sae.num_latents, tile):
        count = min(tile, sae.num_latents - first)
        acts_nP = torch.rand(count, many, generator=generator, device=device)
        match(torch.where(acts_nP > 0.8, acts_nP, 0.0).half().float(), y_PL, test_P, 20)


def probe_test(made: list[tuple[list[int], Latents]], sae: TopK, rows: int) -> None:
    parts = []
    first = 0
    for _, latents in made:
        value_RK = (latents.acts_BK / sae.maximum_N.clamp(min=1e-6)[latents.indices_BK])[: rows - first].double().cpu()
        row_Q, slot_Q = (value_RK > 0).nonzero(as_tuple=True)
        index_RK = latents.indices_BK[: rows - first].cpu()
        parts.append((row_Q + first, index_RK[row_Q, slot_Q], value_RK[row_Q, slot_Q]))
        first += len(value_RK)
        if first == rows:
            break
    row_Q, column_Q, value_Q = (torch.cat(column) for column in zip(*parts, strict=True))
    x = Sparse(row_Q, column_Q, value_Q, first, sae.num_latents)
    y_R = torch.rand(first, generator=torch.Generator().manual_seed(0)) < 0.1
    fit_each(x.only(promising(x, y_R, 1.0, CANDIDATES)), y_R, 1.0)
    fit_all(x, y_R, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, default=HERE / "results.jsonl")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = ESM2Config(4, 64, 4) if options.small else PUBLISHED["esm2_t33_650M_UR50D"]
    num_latents, layer = (512, 2) if options.small else (10_240, 24)
    residues, scored, many = (4_000, 2_000, 400) if options.small else (200_000, 12_000, 50_000)
    where = torch.cuda.get_device_name() if device.type == "cuda" else cpu(torch.get_num_threads())
    timed = Timed(device, stamp("eval-full-shapes", where, "python benchmarks/eval_full_shapes.py"))

    def quiet(*arguments: Any, **named: Any) -> None:
        return

    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        torch.manual_seed(0)
        with torch.device(device):
            model = ESM2(config)
            for parameter in model.parameters():  # on the device, where `init_weights` would draw on the host
                if parameter.ndim == 2:
                    parameter.normal_(std=config.d**-0.5)
            sae = TopK(config.d, num_latents, 64 if not options.small else 8)
            sae.w_enc_ND.normal_(std=config.d**-0.5)
            sae.w_dec_ND.copy_(torch.nn.functional.normalize(sae.w_enc_ND, dim=1))
        save_model(Store(), folder, {k: v.cpu() for k, v in model.state_dict().items()}, asdict(config), {})
        embedder = Embedder(folder, Store(), "auto")
        sequences = proteins(residues)
        shape = f"d {config.d}, {num_latents:,} latents, k {sae.k}, {sum(map(len, sequences)):,} residues"
        nothing = [False] * len(sequences)
        with timed(
            "rows, first", "embedding of 650M and encoding; compiling included" if not options.small else "small"
        ):
            embedder.run(sequences, [layer], nothing, "float32", "auto", quiet, quiet)
        made: list[tuple[list[int], Latents]] = []
        with timed("rows", f"embedding and encoding, {shape}"):
            x_RD = embedder.run(sequences, [layer], nothing, "float32", "auto", quiet, quiet)[layer][0]
            first = 0
            for mine in groups([len(s) for s in sequences], group_residues(device)):
                count = sum(len(sequences[p]) for p in mine)
                made.append((mine, encode_rows(sae, x_RD[first : first + count].to(device))))
                first += count
        for _, latents in made:
            sae.maximum_N.scatter_reduce_(0, latents.indices_BK.flatten(), latents.acts_BK.flatten(), "amax")
        mean_D = x_RD.mean(0).to(device)
        with timed("fidelity, reconstruction", shape):
            figures = Fidelity(num_latents, device)
            for x_BD in torch.split(x_RD, 4096):
                x_BD = x_BD.to(device)
                latents = sae.encode(x_BD)
                figures.update(x_BD, sae.decode(latents), latents, mean_D)
            figures.result()
        some = proteins(scored)
        with timed("fidelity, loss recovered", f"8 passes of {sum(map(len, some)):,} residues in float32"):
            loss_recovered(model.eval(), sae, layer, mean_D.cpu(), some, 0.15, 16_384, quiet, quiet)
        with timed("concepts", f"{CONCEPTS} concepts, counting, choice and second pass, {shape}"):
            concept_test(made, sae, sequences, device)
        with timed("families", f"matching of {many:,} proteins with {CLASSES} classes, {num_latents:,} latents"):
            family_test(made, sae, sequences, many)
        rows = 2_000 if options.small else 10_000
        with timed(
            "probes",
            f"one target, {rows:,} residues, {CANDIDATES} of {num_latents:,} single fits and one joint, on the CPU",
        ):
            probe_test(made, sae, rows)
        with timed("encode", f"the 10 strongest latents of each of {len(sequences):,} proteins"):
            for mine, latents in made:
                lengths = torch.tensor([len(sequences[p]) for p in mine])
                strongest(latents, sae.maximum_N, 10, lengths)
    if not options.small:
        add(options.out, timed.lines)


if __name__ == "__main__":
    main()
