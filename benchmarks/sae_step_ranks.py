"""The TopK step on one GPU and on several: tokens a second and the efficiency of data parallel.

python benchmarks/sae_step_ranks.py; torchrun --nproc-per-node 2 benchmarks/sae_step_ranks.py
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from record import add, stamp
from sae_step_gpu import SHAPES, Batches, synthetic

from plmsae_cli.config.training import SAE, Train
from plmsae_cli.runtime.dist import gang
from plmsae_cli.training.sae_objective import SAEObjective

STEPS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["S1", "S2", "S3"])
    parser.add_argument("--results", type=Path, help="file to add the figures to")
    options = parser.parse_args()
    with gang() as ranks:
        device = torch.device("cuda", ranks.local_rank)
        command = " ".join(["benchmarks/sae_step_ranks.py", *sys.argv[1:]])
        common = stamp("sae-step-ranks", torch.cuda.get_device_name(), command)
        for shape in (shape for shape in SHAPES if shape.name in options.shapes):
            data = Batches(synthetic(shape).to(device), shape.rows)
            train = Train(
                sae=SAE(num_latents=shape.latents, k=shape.k),
                batch_tokens=shape.rows * ranks.world,
                kernels="fused",
                lr=1e-4,
            )
            objective = SAEObjective(train, data, data.mean_D, data.scale, 10**6, ranks, device, torch.bfloat16)  # type: ignore[arg-type]
            objective.start(torch.cat(data.batches[:4]))
            best = float("inf")
            for turn in range(4):
                torch.cuda.synchronize()
                ranks.barrier()
                begin = time.perf_counter()
                for step in range(STEPS):
                    objective.step(turn * STEPS + step)
                torch.cuda.synchronize()
                best = min(best, (time.perf_counter() - begin) / STEPS) if turn else best
            if ranks.first:
                pace = shape.rows * ranks.world / best
                print(f"{shape.name} {ranks.world} GPU(s): {best * 1e3:.3f} ms, {pace:,.0f} tok/s", flush=True)
                if options.results:
                    line = {
                        "name": f"sae-step/{shape.name}-gpus",
                        "who": f"plmsae, {ranks.world} GPU(s)",
                        "value": round(pace),
                        "unit": "tokens/s",
                        **common,
                        "note": f"{shape.rows} tokens a GPU and step, {best * 1e3:.3f} ms, best of 3 turns of {STEPS} steps",
                    }
                    add(options.results, [line])
            del objective, data
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
