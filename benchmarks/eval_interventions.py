"""What `eval.steering` and `eval.structure` compute, once at full tensor shapes on this device: seconds and peak memory.

    python benchmarks/eval_interventions.py                       # ESM-2 650M and 3B, ESMFold, with random weights
    python benchmarks/eval_interventions.py --device cpu --small  # the same code on small shapes

Steering reads 100 proteins at masked residues under 8 latents, each with its three controls. Structure folds proteins of 100, 200
and 400 residues by transformers' ESMFold in the shape of esmfold_v1 (ESM-2 3B, 48 trunk blocks, 4 passes): as they are, and with
the dictionary in the place of layer 36. Weights are random, so the folds mean nothing. Needs transformers and tmtools.
"""

from __future__ import annotations

import argparse
import gc
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from eval_full_shapes import Timed, proteins
from record import HERE, add, cpu, stamp

from plmsae_cli.evaluation.fidelity import masked_residues
from plmsae_cli.evaluation.proteins import groups
from plmsae_cli.evaluation.steering.edits import VARIANTS, Steer
from plmsae_cli.evaluation.steering.readout import measure, prepare, steerable
from plmsae_cli.evaluation.structure.esmfold import ESMFold, folding_class
from plmsae_cli.evaluation.structure.metrics import compare
from plmsae_cli.evaluation.structure.replacements import Reconstruction
from plmsae_cli.evaluation.structure.splicing import Mode, spliced
from plmsae_cli.plm.alphabet import TOKEN_NAMES, encode, pack
from plmsae_cli.plm.esm2 import ESM2, PUBLISHED, ESM2Config
from plmsae_cli.runtime.hub.esm import esm_config
from plmsae_cli.sae.topk import TopK

SMALL = ESM2Config(4, 64, 4)
SMALL_TRUNK = {
    "num_blocks": 2, "sequence_state_dim": 64, "pairwise_state_dim": 32, "sequence_head_width": 16, "pairwise_head_width": 16,
}  # fmt: skip
COMMAND = "python benchmarks/eval_interventions.py"
MODES: tuple[Mode, ...] = ("isolated", "propagated")


def dictionary(d: int, num_latents: int, k: int, device: torch.device) -> TopK:
    with torch.device(device):
        sae = TopK(d, num_latents, k)
        sae.w_enc_ND.normal_(std=d**-0.5)
        sae.w_dec_ND.copy_(torch.nn.functional.normalize(sae.w_enc_ND, dim=1))
        sae.maximum_N.fill_(4.0)
    return sae


def steering(timed: Timed, name: str, config: ESM2Config, layer: int, sae: TopK, count: int) -> None:
    device = sae.maximum_N.device
    with torch.device(device):
        model = ESM2(config).eval()
        for parameter in model.parameters():  # on the device, where `init_weights` would draw on the host
            if parameter.ndim == 2:
                parameter.normal_(std=config.d**-0.5)
    sequences = [sequence[:510] for sequence in proteins(500 * count)][:count]
    steers = [Steer(latent, latent + 1, 1.0) for latent in range(0, 16, 2)]
    residues = sum(map(len, sequences))
    passes = len(steers) * len(VARIANTS)
    with timed(name, f"{passes} passes of {residues:,} residues in {len(sequences)} proteins, float32, clamp"):
        for places in groups([len(sequence) + 2 for sequence in sequences], 16_384):
            chosen = [sequences[place] for place in places]
            packed = pack([encode(sequence) for sequence in chosen]).to(device)
            batch = prepare(model, packed, masked_residues(packed, chosen, 0.15), layer)
            measure(model, sae, batch, steers, "clamp", steerable(batch, None), False)


def structure(timed: Timed, config: ESM2Config, sae: TopK, lengths: list[int], trunk: dict[str, Any] | None) -> None:
    device = sae.maximum_N.device
    of_transformers = folding_class()
    from transformers.models.esm.configuration_esm import EsmConfig

    head = {"trunk": trunk} if trunk else {}
    about = esm_config(asdict(config), 1024) | {"is_folding_model": True, "esmfold_config": head}
    with torch.device(device):
        folder = ESMFold(of_transformers(EsmConfig(**about, vocab_list=list(TOKEN_NAMES))), None)
    mean_D = torch.zeros(config.d, device=device)
    for sequence in proteins(100_000):
        if len(sequence) < max(lengths):
            continue
        for length in lengths:
            with timed(f"{length} residues", "one fold as it is"):
                original = folder.fold(sequence[:length])
            with timed(f"{length} residues, spliced", f"a fold in each of {len(MODES)} modes, and metrics"):
                for mode in MODES:
                    with spliced(folder.trunk, config.num_layers, mode, Reconstruction(sae, mean_D)):
                        compare(folder.fold(sequence[:length]).alpha_L3, original.alpha_L3)
        return


def steer_all(timed: Timed, device: torch.device, small: bool) -> None:
    if small:
        steering(timed, "small", SMALL, 2, dictionary(SMALL.d, 256, 8, device), 4)
        return
    for name, layer, latents, k in (("650M", 24, 10_240, 64), ("3B", 36, 20_480, 32)):
        config = published(name)
        steering(timed, name, config, layer, dictionary(config.d, latents, k, device), 100)
        gc.collect()
        torch.cuda.empty_cache()


def fold_all(timed: Timed, device: torch.device, small: bool) -> None:
    if small:
        structure(timed, SMALL, dictionary(SMALL.d, 256, 8, device), [20, 40], SMALL_TRUNK)
        return
    config = published("3B")
    structure(timed, config, dictionary(config.d, 20_480, 32, device), [100, 200, 400], None)


def published(name: str) -> ESM2Config:
    return next(config for label, config in PUBLISHED.items() if name in label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--axes", nargs="+", choices=["steering", "structure"], default=["steering", "structure"])
    parser.add_argument("--out", type=Path, default=HERE / "results.jsonl", help="file to add the figures to")
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else cpu(torch.get_num_threads())
    torch.manual_seed(0)
    with torch.no_grad():
        for axis in options.axes:
            timed = Timed(device, stamp(f"eval-{axis}", where, COMMAND), f"eval/{axis}")
            (steer_all if axis == "steering" else fold_all)(timed, device, options.small)
            if not options.small:
                add(options.out, timed.lines)


if __name__ == "__main__":
    main()
