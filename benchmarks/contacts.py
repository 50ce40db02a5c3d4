"""How long the categorical Jacobian of one protein takes, with a layer as it is and with a dictionary spliced in.

    python benchmarks/contacts.py [--device cuda] [--length 200] [--tokens 131072] [--compute float16] [--record]
    python benchmarks/contacts.py --device cpu --small

Weights are random, shapes those of ESM-2 650M with a TopK dictionary of 10,240 latents (k 32) at layer 24; time does not
depend on the values. The clock covers 19 x length + 1 forward passes and the couplings, after a warm-up on a short protein.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np
import torch

from benchmarks.record import HERE, add, cpu, stamp
from plmsae_cli.evaluation.contacts.jacobian import coupling, jacobian
from plmsae_cli.plm.alphabet import FIRST_LETTER
from plmsae_cli.plm.attention import attention_backend
from plmsae_cli.plm.esm2 import ESM2, PUBLISHED, ESM2Config
from plmsae_cli.sae.topk import TopK

SMALL = ESM2Config(4, 64, 4)


def random_plm(config: ESM2Config, device: torch.device, dtype: torch.dtype) -> ESM2:
    """Weights of the deviation that training starts from: no number overflows in float16."""
    with torch.device(device):
        model = ESM2(config)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    return model.to(dtype).eval()


def random_sae(d: int, num_latents: int, k: int, device: torch.device) -> TopK:
    """Unit rows, encoder equal to decoder."""
    with torch.device(device):
        sae = TopK(d, num_latents, k)
    with torch.no_grad():
        torch.nn.init.normal_(sae.w_dec_ND)
        sae.normalize_decoder()
        sae.w_enc_ND.copy_(sae.w_dec_ND)
    return sae.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--small", action="store_true", help="4 layers of width 64, 40 residues: seconds on a CPU")
    parser.add_argument("--length", type=int, default=None, help="residues; 200, or 40 with --small")
    parser.add_argument("--tokens", type=int, default=None, help="tokens of a pack; 131072, or 4096 on a CPU")
    parser.add_argument("--compute", default=None, help="float16 on a GPU, float32 on a CPU")
    parser.add_argument("--record", action="store_true", help="append to benchmarks/results.jsonl")
    options = parser.parse_args()
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    config = SMALL if options.small else PUBLISHED["esm2_t33_650M_UR50D"]
    length = options.length or (40 if options.small else 200)
    tokens = options.tokens or (131_072 if on_gpu else 4096)
    compute = options.compute or ("float16" if on_gpu else "float32")
    plm = random_plm(config, device, getattr(torch, compute))
    layer = 2 if options.small else 24
    sae = random_sae(config.d, 8 * config.d, 8 if options.small else 32, device)
    values: dict[str, Any] = {"original": None, "dictionary": lambda x_TD: sae(x_TD.float())}
    residues_L = (np.random.default_rng(0).integers(20, size=length) + FIRST_LETTER).astype(np.uint8)
    name = torch.cuda.get_device_name(device) if on_gpu else cpu(torch.get_num_threads())
    backend = attention_backend(device, getattr(torch, compute), config.head_dim)
    print(f"{name}, torch {torch.__version__}, {compute}, attention by {backend}")
    print(f"{config.num_layers} layers of {config.d}, {length} residues, packs of {tokens:,} tokens, splice at {layer}")
    lines = []
    for variant, value in values.items():
        few = min(length, 24)
        coupling(jacobian(plm, residues_L[:few], layer, value, tokens, device))
        if on_gpu:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        begun = time.perf_counter()
        scores_LL = coupling(jacobian(plm, residues_L, layer, value, tokens, device)).cpu()
        seconds = time.perf_counter() - begun
        assert scores_LL.shape == (length, length)
        assert bool(scores_LL.isfinite().all())
        passes = 19 * length + 1
        memory = torch.cuda.max_memory_allocated(device) if on_gpu else None
        shown = "" if memory is None else f", peak {memory / 1e9:.1f} GB"
        print(f"{variant}: {seconds:.2f} s, {passes * (length + 2) / seconds:,.0f} tokens/s{shown}")
        note = f"{length} residues, {compute}{shown}"
        lines.append(
            {"name": "contacts/jacobian", "who": f"plmsae, {variant}", "value": seconds, "unit": "s", "note": note}
        )
    if options.record:
        about = stamp("contacts", name, "python benchmarks/contacts.py")
        add(HERE / "results.jsonl", [{**line, **about} for line in lines])


if __name__ == "__main__":
    main()
