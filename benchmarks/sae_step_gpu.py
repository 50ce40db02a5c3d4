"""One optimiser step of a TopK dictionary on a GPU: ours beside sparsify, dictionary_learning and SAELens, in one run.

    pip install --no-deps eai-sparsify dictionary-learning sae-lens einops natsort simple-parsing docstring-parser
    python benchmarks/sae_step_gpu.py [--shapes S1 S3] [--dead 0 5 30] [--architectures]
    python benchmarks/sae_step_gpu.py --shapes S1 --model RUN/plm --fasta proteins.fasta --layer 3
    python benchmarks/sae_step_gpu.py --only fused --results benchmarks/results.jsonl

A step is forward, backward, projection, clipping, Adam and renormalisation, with AuxK and dead counting where a side has
them; batches lie on the GPU. Milliseconds are medians over steps, by CUDA events. `--dead`: percent of the latents called
dead before every step, on all sides alike. `--model`: activations of a language model as wide as the shape instead of
synthetic ones; every side then first trains for some hundred steps, so that its latents fire as they do in earnest.
`--only`: TopK and these of our other architectures, or those with `fused` kernels, which take seconds each, as nothing is
compiled by torch; figures go by the name sae-step/SHAPE-fused.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from types import MappingProxyType, ModuleType, SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

import torch
from activations import activations
from record import add, stamp
from torch import Tensor

from plmsae_cli.config.sae import SAE
from plmsae_cli.config.training import Train
from plmsae_cli.runtime.dist import Gang
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.jumprelu import JumpReLU
from plmsae_cli.training.sae_objective import SAEObjective

DEVICE = torch.device(
    "cuda" if torch.cuda.is_available() else "cpu"
)  # without a GPU, for what sae_quality takes from here
Weights = Callable[[], list[Tensor]]
Step = tuple[Callable[[int, float], Any], Weights]
"""Trains on a numbered batch at a learning rate; w_enc [N, D], b_enc [N], w_dec [N, D], b_dec [D]."""
WARM, TIMED, SETTLE, RATE = 6, 20, 600, 1e-4


@dataclass(frozen=True)
class Shape:
    name: str
    rows: int
    d: int
    latents: int
    k: int


SHAPES = [
    Shape("S1", 8192, 1280, 10_240, 32),
    Shape("S2", 8192, 2560, 40_960, 64),
    Shape("S3", 8192, 768, 24_576, 32),
    Shape("S4", 2048, 2560, 20_480, 32),
]


@dataclass
class Dead:
    mask: Tensor
    any_dead: bool


class Batches:
    """Raw rows on the GPU, and what `SAEObjective` asks of a stream."""

    def __init__(self, rows_RD: Tensor, rows: int) -> None:
        self.batches = list(rows_RD.split(rows))
        self.mean_D = (sum(batch.double().sum(0) for batch in self.batches) / len(rows_RD)).float()
        squares = sum((batch.float() - self.mean_D).square().sum() for batch in self.batches) / len(rows_RD)
        self.scale = float((rows_RD.shape[1] / squares).sqrt())
        self.blocks, self.wait_seconds = SimpleNamespace(d=rows_RD.shape[1], quantiser=None), 0.0

    def rows(self, step: int) -> Tensor:
        return self.batches[step % len(self.batches)]

    def standardised(self, step: int) -> Tensor:
        return (self.rows(step).float() - self.mean_D) * self.scale


def synthetic(shape: Shape) -> Tensor:
    """Sparse combinations of 4 d directions, and noise; bfloat16."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    random = lambda *size: torch.rand(*size, device=DEVICE, generator=generator)  # noqa: E731
    features = torch.randn(4 * shape.d, shape.d, device=DEVICE, generator=generator) / shape.d**0.5
    out = []
    for _ in range(4):
        weights = torch.where(random(shape.rows, 4 * shape.d) < 0.01, 3 * random(shape.rows, 4 * shape.d), 0.0)
        noise = torch.randn(shape.rows, shape.d, device=DEVICE, generator=generator)
        out.append((weights @ features + 0.05 * noise).bfloat16())
    return torch.cat(out)


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "plmsae Matryoshka": ("fused", {"architecture": "matryoshka_topk"}),
    "plmsae BatchTopK": ("fused", {"architecture": "batch_topk"}),
    "plmsae Matryoshka BatchTopK": ("fused", {"architecture": "matryoshka_batch_topk"}),
    "plmsae JumpReLU": ("fused", {"architecture": "jumprelu"}),
    "plmsae JumpReLU at its start": ("fused", {"architecture": "jumprelu"}),
    "plmsae JumpReLU (plain)": ("plain", {"architecture": "jumprelu"}),
    "plmsae ReLU + L1": ("auto", {"architecture": "relu_l1"}),
    "plmsae Gated": ("auto", {"architecture": "gated"}),
    "plmsae Switch 32": ("fused", {"architecture": "switch", "num_experts": 32}),
    "plmsae Switch 32 (plain)": ("plain", {"architecture": "switch", "num_experts": 32}),
}
"""Kernels and options of the other architectures."""
AT_TARGET = ("plmsae JumpReLU", "plmsae JumpReLU (plain)")
"""Whose thresholds are first set so that about k latents of a token are active, as training makes them."""


def plmsae(
    shape: Shape,
    data: Batches,
    dead: Dead,
    moments: str,
    kernels: str = "fused",
    kind: Mapping[str, Any] = MappingProxyType({}),
    at_target: bool = False,
) -> Step:
    sae = {"architecture": "topk", "num_latents": shape.latents, "k": shape.k, **kind}
    if sae["architecture"] in ("jumprelu", "relu_l1", "gated"):
        del sae["k"]
    if sae["architecture"] == "jumprelu":
        sae["target_l0"] = shape.k
    options = Train(
        sae=SAE(**sae),
        batch_tokens=shape.rows,
        moments=moments,
        kernels=kernels,
        lr=RATE,
        compute="bfloat16",
    )
    steps = 10**6
    objective = SAEObjective(options, data, data.mean_D, data.scale, steps, Gang(), DEVICE, torch.bfloat16)  # type: ignore[arg-type]
    objective.start(torch.cat(data.batches[:4]))
    if at_target:
        reach_target(objective.model, data.standardised(0), shape.k)
    ages_N = objective.tensors()["tokens_since_fired_N"]

    def step(index: int, rate: float) -> Any:
        if dead.any_dead:
            ages_N.masked_fill_(dead.mask, 10**12)
        return objective.step(index)

    return step, lambda: list(objective.model.parameters())


@torch.no_grad()
def reach_target(model: Dictionary, x_BD: Tensor, k: int) -> None:
    """One threshold for all latents, which k scores a token reach on average."""
    assert isinstance(model, JumpReLU)
    x_BD = x_BD[:1024]
    scores_BN = (x_BD - model.b_dec_D) @ model.w_enc_ND.T + model.b_enc_N
    model.log_theta_N.fill_(scores_BN.flatten().topk(k * len(x_BD)).values[-1].log())


def sparsify(shape: Shape, data: Batches, dead: Dead) -> Step:
    coder, config = _import("eai-sparsify", "sparsify", "sparse_coder", "config")
    sae = coder.SparseCoder(
        shape.d, config.SparseCoderConfig(num_latents=shape.latents, k=shape.k), device=DEVICE, dtype=torch.float32
    )
    sae.b_dec.data = data.standardised(0).mean(0)
    adam = torch.optim.Adam(sae.parameters(), lr=RATE, fused=True)

    def step(index: int, rate: float) -> Any:
        adam.param_groups[0]["lr"] = rate
        out = sae(data.standardised(index), dead_mask=dead.mask if dead.any_dead else None)
        (out.fvu + out.auxk_loss / 32).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        adam.step()
        adam.zero_grad()
        sae.set_decoder_norm_to_unit_norm()

    return step, lambda: [sae.encoder.weight, sae.encoder.bias, sae.W_dec, sae.b_dec]


def dictionary_learning(shape: Shape, data: Batches, dead: Dead, autocast: bool) -> Step:
    (top_k,) = _import("dictionary-learning", "dictionary_learning", "trainers.top_k")
    trainer = top_k.TopKTrainer(10**6, shape.d, shape.latents, shape.k, 0, "", lr=RATE, warmup_steps=0, device=DEVICE)

    def step(index: int, rate: float) -> Any:
        trainer.optimizer.param_groups[0]["lr"] = rate
        if dead.any_dead:
            trainer.num_tokens_since_fired.masked_fill_(dead.mask, 10**8)
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            trainer.update(index, data.standardised(index))

    ae = trainer.ae
    return step, lambda: [ae.encoder.weight, ae.encoder.bias, ae.decoder.weight.T, ae.b_dec]


def saelens(shape: Shape, data: Batches, dead: Dead) -> Step:
    top_k, base = _import(None, "sae_lens", "saes.topk_sae", "saes.sae")
    config = top_k.TopKTrainingSAEConfig(
        d_in=shape.d, d_sae=shape.latents, k=shape.k, device="cuda", dtype="float32", apply_b_dec_to_input=True
    )
    sae = top_k.TopKTrainingSAE(config).to(DEVICE)
    adam = torch.optim.Adam(sae.parameters(), lr=RATE)
    wanted = {"coefficients": {}, "dead_neuron_mask": dead.mask if dead.any_dead else None, "is_logging_step": False}
    fields = base.TrainStepInput.__dataclass_fields__
    extra = {name: value for name, value in wanted.items() if name in fields}

    def step(index: int, rate: float) -> Any:
        adam.param_groups[0]["lr"] = rate
        steps = {"n_training_steps": index} if "n_training_steps" in fields else {}
        with torch.autocast("cuda", torch.bfloat16):
            out = sae.training_forward_pass(base.TrainStepInput(sae_in=data.standardised(index), **extra, **steps))
        adam.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        adam.step()

    return step, lambda: [sae.W_enc.T, sae.b_enc, sae.W_dec, sae.b_dec]


def limit(shape: Shape, data: Batches, dead: Dead) -> Step:
    """What no step does without: the product with the encoder, and Adam's pass over float32 state."""
    x_BD = data.standardised(0).bfloat16()
    w_ND = torch.randn(shape.latents, shape.d, device=DEVICE, dtype=torch.bfloat16)
    parameters = [torch.randn(shape.latents, shape.d, device=DEVICE, requires_grad=True) for _ in range(2)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    adam = torch.optim.Adam(parameters, fused=True)

    def step(index: int, rate: float) -> Any:
        x_BD @ w_ND.t()
        adam.step()

    return step, list


class _Nothing:
    def __init__(self, *_: Any, **__: Any) -> None: ...


class _Root(torch.nn.Module):
    """What SAELens asks of its base class in training."""

    def setup(self) -> None: ...


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands in for tooling of language models that a peer imports and a step does not use; asked last of all finders."""

    ROOTS = frozenset(
        [
            "accelerate",
            "babe",
            "circuitsvis",
            "datasets",
            "huggingface_hub",
            "matplotlib",
            "nltk",
            "nnsight",
            "pandas",
            "plotly",
            "plotly_express",
            "requests",
            "tenacity",
            "transformer_lens",
            "transformers",
            "umap",
            "wandb",
        ]
    )

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        if name.partition(".")[0] in self.ROOTS:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        stub = MagicMock(__name__=spec.name, HookPoint=torch.nn.Identity, HookedRootModule=_Root)
        return cast(ModuleType, stub)

    def exec_module(self, module: ModuleType) -> None: ...


def _import(project: str | None, package: str, *names: str) -> list[ModuleType]:
    """Modules of a peer; with `project`, without its `__init__`, which imports all of its tooling."""
    if not any(isinstance(finder, _Absent) for finder in sys.meta_path):
        sys.meta_path.append(_Absent())
    if project is not None and package not in sys.modules:
        sys.modules.setdefault("transformers", MagicMock())  # tooling too, and installed it may not load
        for bare_name in (package, *(f"{package}.{name.rpartition('.')[0]}" for name in names if "." in name)):
            bare = sys.modules[bare_name] = ModuleType(bare_name)
            bare.__path__ = [str(distribution(project).locate_file(bare_name.replace(".", "/")))]
    return [importlib.import_module(f"{package}.{name}") for name in names]


def measure(make: Callable[[], Step], settle: int) -> tuple[list[float], float, str]:
    """Milliseconds of a step in a row and of each timed step alone in order of size; GiB at the peak of a step; L0 at the end."""
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    step, _ = make()
    for index in range(settle + WARM):
        step(index, RATE)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    times = []
    for index in range(TIMED):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        step(settle + WARM + index, RATE)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    # Back to back, as in training: the host runs ahead.
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for index in range(TIMED):
        seen = step(settle + WARM + TIMED + index, RATE)
    end.record()
    torch.cuda.synchronize()
    l0 = f"; L0 {float(seen['l0']):.1f}" if isinstance(seen, Mapping) else ""
    times = [begin.elapsed_time(end) / TIMED, *sorted(times)]
    return times, (torch.cuda.max_memory_allocated() - before) / 2**30, l0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=[shape.name for shape in SHAPES])
    parser.add_argument("--dead", nargs="+", type=int, default=[0])
    parser.add_argument("--model", help="weights of a language model, for real activations")
    parser.add_argument("--fasta", help="its proteins")
    parser.add_argument("--layer", type=int)
    parser.add_argument("--only-ours", action="store_true")
    parser.add_argument("--architectures", action="store_true", help="time the others too")
    parser.add_argument(
        "--only", nargs="+", choices=["fused", *OTHERS], metavar="KIND", help="ours alone: TopK and these"
    )
    parser.add_argument("--settle", type=int, default=SETTLE, help="steps on real activations before timing")
    parser.add_argument("--results", type=Path, help="file to add the figures to")
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    shapes = [shape for shape in SHAPES if shape.name in options.shapes]
    command = " ".join(["python benchmarks/sae_step_gpu.py", *sys.argv[1:]])
    common = stamp("sae-step-gpu", torch.cuda.get_device_name(), command)
    for shape in shapes:
        if options.model:
            rows_RD, _ = activations(options.model, options.fasta, [options.layer], 100 * shape.rows, 0)
            assert rows_RD.shape[1] == shape.d, f"{shape.name} is for d = {shape.d}"
        else:
            rows_RD = synthetic(shape)
        data = Batches(rows_RD, shape.rows)
        suffix = ("-fused" if options.only else "") + ("-real" if options.model else "")
        for percent in options.dead:
            mask_N = torch.zeros(shape.latents, dtype=torch.bool, device=DEVICE)
            mask_N[: shape.latents * percent // 100] = True
            dead = Dead(mask_N[torch.randperm(shape.latents, device=DEVICE)], percent > 0)
            sides: list[tuple[str, str, Callable[..., Step], tuple[Any, ...]]] = [
                ("plmsae", "float32 moments", plmsae, ("float32",)),
                ("plmsae bf16 moments", "bfloat16 moments", plmsae, ("bfloat16",)),
                ("limit (encoder GEMM + Adam)", "bf16 product, torch's fused Adam", limit, ()),
            ]
            wanted = options.only or (OTHERS if options.architectures else ())
            sides = sides[:1] if options.only else sides
            sides += [
                (who, f"{k} kernels", plmsae, ("float32", k, kind, who in AT_TARGET))
                for who, (k, kind) in OTHERS.items()
                if who in wanted or (k == "fused" and "fused" in wanted)
            ]
            if not (options.only_ours or options.only):
                sides += [
                    ("plmsae (plain twin)", "the same step by autograd, bf16 autocast", plmsae, ("float32", "plain")),
                    ("sparsify", "its bf16 autocast and Triton decoder, fused Adam", sparsify, ()),
                    ("dictionary_learning", "bf16 autocast", dictionary_learning, (True,)),
                    ("dictionary_learning TF32", "TF32", dictionary_learning, (False,)),
                    ("SAELens", "bf16 autocast", saelens, ()),
                ]
            for who, note, make, arguments in sides:
                try:
                    settle = options.settle if options.model else 0
                    times, peak, l0 = measure(lambda make=make, a=arguments: make(shape, data, dead, *a), settle)  # noqa: B023
                except Exception as error:
                    print(f"{shape.name} dead {percent} % {who}: failed: {error!r:.200}", flush=True)
                    continue
                burst, median = times[0], times[1:][TIMED // 2]
                print(
                    f"{shape.name} dead {percent:2} % {who:28} {median:7.3f} ms alone {burst:7.3f} ms in a row "
                    f"{shape.rows / burst * 1e3:12,.0f} tok/s  peak {peak:.2f} GiB{l0}",
                    flush=True,
                )
                if options.results:
                    line = {
                        "name": f"sae-step/{shape.name}{suffix}" + (f"-dead{percent}" if percent else ""),
                        "who": who,
                        "value": round(shape.rows / burst * 1e3),
                        "unit": "tokens/s",
                        **common,
                        "note": f"{note}; B {shape.rows}, d {shape.d}, n {shape.latents}, k {shape.k}; {burst:.3f} ms a step "
                        f"in a row, {median:.3f} ms alone; peak {peak:.2f} GiB{l0}",
                    }
                    add(options.results, [line])


if __name__ == "__main__":
    main()
