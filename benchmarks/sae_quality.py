"""What dictionaries reconstruct after equal tokens: ours beside sparsify's, dictionary_learning's and SAELens's, in one run.

    (peers as in sae_step_gpu.py; without a GPU, set SPARSIFY_DISABLE_TRITON=1)
    python benchmarks/sae_quality.py --model RUN/plm --fasta proteins.fasta --layers 3 --latents 10240 --k 32

All see the same rows in the same order, standardised alike, with one warm-up and decay, and with the peak rate of our
`train.lr: auto`; peers also with the rate they take by themselves, Gao et al.'s. Scored on residues of other proteins by
`Fidelity` on our TopK with each side's weights (others of our architectures by themselves).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from activations import activations
from record import add, cpu, stamp
from sae_step_gpu import DEVICE, Batches, Dead, Shape, Step, dictionary_learning, saelens, sparsify
from torch import Tensor

from plmsae_cli.config.sae import SAE
from plmsae_cli.config.training import Train
from plmsae_cli.runtime.dist import Gang
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.fidelity import Fidelity
from plmsae_cli.sae.topk import TopK
from plmsae_cli.training.sae_objective import MEDIAN_ROWS, SAEObjective
from plmsae_cli.training.schedules import learning_rate, sae_learning_rate, topk_learning_rate

WIDE_SWITCH = "plmsae Switch, 8 experts, 8 n latents"
ON_GPU = DEVICE.type == "cuda"


def ours(
    shape: Shape, data: Batches, steps: int, seed: int, rate: float, sae: dict[str, Any], **train: Any
) -> SAEObjective:
    options = Train(
        sae=SAE(**{"num_latents": shape.latents, "k": shape.k, **sae}),
        batch_tokens=shape.rows,
        seed=seed,
        lr=rate,
        **train,
    )
    compute = torch.bfloat16 if ON_GPU else torch.float32
    objective = SAEObjective(options, data, data.mean_D, data.scale, steps, Gang(), DEVICE, compute)  # type: ignore[arg-type]
    objective.start(torch.cat(data.batches)[:MEDIAN_ROWS])
    return objective


@torch.inference_mode()
def score(model: Dictionary, data: Batches, heldout_RD: Tensor) -> dict[str, Any]:
    figures = Fidelity(model.num_latents, DEVICE)
    model.eval()
    for raw_BD in heldout_RD.split(4096):
        x_BD = (raw_BD.float() - data.mean_D) * data.scale
        latents = model.encode(x_BD)
        figures.update(x_BD, model.decode(latents), latents, torch.zeros_like(data.mean_D))
    return figures.result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--fasta", required=True)
    parser.add_argument("--layers", type=int, nargs="+", required=True, help="several stand side by side")
    parser.add_argument("--latents", type=int, required=True)
    parser.add_argument("--k", type=int, required=True)
    parser.add_argument("--rows", type=int, default=8192, help="tokens of a step")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--residues", type=int, help="different training rows; by default no row is seen twice")
    parser.add_argument("--heldout", type=int, default=262_144)
    parser.add_argument("--lr", type=float, help="peak; default that of train.lr: auto")
    parser.add_argument("--sides", nargs="+", help="only these, by their names")
    parser.add_argument("--results", type=Path, help="file to add the figures to")
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    residues = options.residues or options.steps * options.rows
    rows_RD, heldout_RD = activations(options.model, options.fasta, options.layers, residues, options.heldout)
    shape = Shape("", options.rows, rows_RD.shape[1], options.latents, options.k)
    data = Batches(rows_RD, shape.rows)
    steps = options.steps
    peak = options.lr or sae_learning_rate("adam", shape.latents, shape.d, steps)
    nothing = Dead(torch.zeros(shape.latents, dtype=torch.bool, device=DEVICE), False)
    fused: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "plmsae": ({}, {}),
        "plmsae bf16 moments": ({}, {"moments": "bfloat16"}),
        "plmsae (plain twin)": ({}, {"kernels": "plain"}),
        "plmsae Matryoshka": ({"architecture": "matryoshka_topk"}, {}),
        "plmsae BatchTopK": ({"architecture": "batch_topk"}, {}),
        "plmsae Switch, 8 experts": ({"architecture": "switch", "num_experts": 8}, {}),
        WIDE_SWITCH: ({"architecture": "switch", "num_experts": 8, "num_latents": 8 * shape.latents}, {}),
    }
    if not ON_GPU:  # no kernels to compare
        del fused["plmsae (plain twin)"], fused["plmsae bf16 moments"]
    peers: dict[str, Callable[..., Step]] = {
        "sparsify": sparsify,
        "dictionary_learning": lambda *a: dictionary_learning(*a, ON_GPU),
        "SAELens": saelens,
    }
    own = topk_learning_rate(shape.latents)
    rates = dict.fromkeys([*fused, *peers], peak) | {f"{who}, its own rate": own for who in peers}
    rates[WIDE_SWITCH] = options.lr or sae_learning_rate("adam", 8 * shape.latents, shape.d, steps)
    if unknown := set(options.sides or ()) - rates.keys():
        parser.error(f"--sides: no {', '.join(sorted(unknown))}; there are {'; '.join(rates)}")
    command = " ".join(["python benchmarks/sae_quality.py", *sys.argv[1:]])
    common = stamp("sae-quality", torch.cuda.get_device_name() if ON_GPU else cpu(torch.get_num_threads()), command)
    for who, rate in rates.items():
        if options.sides and who not in options.sides:
            continue
        found = []
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            try:
                begin = time.monotonic()
                if who in fused:
                    sae, train = fused[who]
                    objective = ours(shape, data, steps, seed, rate, sae, **train)
                    for step in range(steps):
                        objective.step(step)
                    model: Dictionary = objective.model
                else:
                    step_of, weights = peers[who.partition(",")[0]](shape, data, nothing)
                    warm = min(1000, steps // 20)
                    for step in range(steps):
                        step_of(step, learning_rate(step, steps, rate, warm, 0.2))
                    model = TopK(shape.d, shape.latents, shape.k).to(DEVICE)
                    with torch.no_grad():
                        for mine, theirs in zip(model.parameters(), weights(), strict=True):
                            mine.copy_(theirs)
                if ON_GPU:
                    torch.cuda.synchronize()
                found.append(score(model, data, heldout_RD) | {"seconds": time.monotonic() - begin})
            except Exception as error:
                print(f"{who}: failed: {error!r:.300}", flush=True)
                break
        if not found:
            continue
        fvu = [round(f["fvu"], 4) for f in found]
        dead = sum(f["dead_share"] for f in found) / len(found)
        l0 = sum(f["l0_mean"] for f in found) / len(found)
        seconds = min(f["seconds"] for f in found)
        print(
            f"d {shape.d} n {shape.latents} k {shape.k} {who:38} FVU {sum(fvu) / len(fvu):.4f} {fvu} dead {dead:.1%} L0 {l0:.1f} "
            f"{seconds:.1f} s",
            flush=True,
        )
        if options.results:
            line = {
                "name": f"sae-quality/d{shape.d}-layer{'+'.join(map(str, options.layers))}-n{shape.latents}-k{shape.k}-fvu",
                "who": who,
                "value": round(sum(fvu) / len(fvu), 4),
                "unit": "FVU",
                **common,
                "note": f"seeds {fvu}; dead {dead:.1%}, L0 {l0:.1f} on {len(heldout_RD):,} held-out residues after "
                f"{steps * shape.rows:,} tokens, peak rate {rate:.2g}; {seconds:.1f} s to train and score",
            }
            add(options.results, [line])


if __name__ == "__main__":
    main()
