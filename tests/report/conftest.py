"""Run folders as the pipeline leaves them, small and plausible, and what a browser would see in their pages."""

from __future__ import annotations

import json
import math
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)> $\\frac{1}{0}$ \u202egnp.exe\x00\x1b[31m"
"""A FASTA header that tries to be markup, mathematics, a terminal command, a change of reading direction."""
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"
RADIUS = 10

RESOLVED = """\
name: esm2-8m-l3-topk
root: runs
launch:
  executor: local
  gpus: auto
model:
  weights: esm2_t6_8M_UR50D
embed:
  fasta: cath.fasta.gz
  layers:
  - 3
train:
  kind: sae
  layer:
  seed: 0
  sae:
    architecture: topk
    num_latents: 2560
    k: 32
  tokens: 4000000
  batch_tokens: 2048
eval:
  fidelity:
    loss_recovered: true
"""


def write_json(path: Path, body: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body), encoding="utf-8")


def sae_lines(num_lines: int = 400) -> list[dict[str, float]]:
    """A training run: exponential approach to its plateau, with noise of a fixed seed."""
    noise = np.random.default_rng(0).normal(size=(num_lines, 3))
    lines = []
    for index in range(num_lines):
        at = (index + 1) / num_lines
        reconstruction = 0.15 + 0.9 * math.exp(-9 * at) + 0.006 * noise[index, 0]
        aux = 0.6 + 0.4 * math.exp(-4 * at)
        lines.append(
            {
                "step": 5 * (index + 1), "tokens": 10_240 * (index + 1), "loss": reconstruction + aux / 32,
                "reconstruction": reconstruction, "aux": aux, "fvu": reconstruction * 0.98,
                "l0": 32.0, "dead": max(0.0, 0.3 * math.exp(-((at - 0.3) ** 2) / 0.02) + 0.02 * at),
                "lr": 2e-4 * min(1.0, 5 * (1 - at)), "grad_norm": 0.3 + 0.02 * abs(noise[index, 1]),
                "tokens_per_second": 61_000 + 900 * noise[index, 2], "loader_wait": 0.01,
            }
        )  # fmt: skip
    return lines


def plm_lines() -> list[dict[str, Any]]:
    lines: list[dict[str, Any]] = []
    for step in range(50, 3001, 50):
        lines.append({"step": step, "tokens": 16_384 * step, "loss": 2.4 + 0.6 * math.exp(-step / 500), "lr": 1e-3})
        if step % 500 == 0:
            loss = 2.42 + 0.6 * math.exp(-step / 500)
            scores = {"loss": loss, "perplexity": math.exp(loss), "accuracy": 0.24}
            lines.append({"step": step, "valid": {"random": scores, "clusters": {**scores, "perplexity": 13.5}}})
    return lines


def fidelity(**changes: Any) -> dict[str, Any]:
    masked = {
        "ce": 2.6131, "ce_sae": 2.6342, "ce_zero": 3.1108, "ce_mean": 2.9047, "recovered_zero": 0.95759,
        "recovered_mean": 0.92764, "kl": 0.0311, "interval_recovered_zero": [0.9512, 0.9631],
        "interval_recovered_mean": [0.9188, 0.9358],
    }  # fmt: skip
    unmasked = {
        "ce": 0.4127, "ce_sae": 0.4391, "ce_zero": 3.2511, "ce_mean": 2.2107, "recovered_zero": 0.99070,
        "recovered_mean": 0.98532, "kl": 0.0187, "interval_recovered_zero": [0.9893, 0.9921],
    }  # fmt: skip
    body = {
        "fvu": 0.16137, "fvu_median_token": 0.12931, "cosine": 0.9312, "l0_mean": 31.97,
        "l0_deciles": [12, 27, 30, 31, 32, 32, 33, 34, 36, 39, 71], "dead_share": 0.0213,
        "dead_window_tokens": 410_000, "gamma": 1.83, "heldout_rows": 21_484, "heldout_proteins": 102,
        "spliced_identity": "exact", "loss": {"proteins": 102, "masked": masked, "unmasked": unmasked},
    }  # fmt: skip
    return {**body, **changes}


def scores(demo: bool = False, **changes: Any) -> dict[str, Any]:
    return {
        "schema": 1, "demo": demo, "layer": 3, "architecture": "topk", "num_latents": 2560, "k": 32,
        "fidelity": fidelity(**changes),
    }  # fmt: skip


def write_latents(path: Path, *, header: str = "sp|P{0:05d}|PROT{0}_ECOLI", num_latents: int = 2560) -> dict[str, Any]:
    """latents.parquet; returns its columns. Contexts are windows of random proteins of 60 residues."""
    rng = np.random.default_rng(1)
    density = np.where(rng.random(num_latents) < 0.04, 0.0, 10 ** rng.normal(-2.3, 0.7, num_latents)).clip(0, 0.9)
    proteins = ["".join(letters) for letters in rng.choice(list(AMINO_ACIDS), (num_latents, 60))]
    places = rng.integers(1, 61, num_latents)
    peak = np.where(density > 0, rng.gamma(3.0, 4.0, num_latents), 0.0)
    columns = {
        "latent": np.arange(num_latents),
        "density": density,
        "max": peak,
        "mean_active": peak * 0.4,
        "dead": density == 0,
        "top_protein": [header.format(i) if density[i] > 0 else None for i in range(num_latents)],
        "top_residue": [int(p) if density[i] > 0 else None for i, p in enumerate(places)],
        "top_context": [
            proteins[i][max(0, p - 1 - RADIUS) : p + RADIUS] if density[i] > 0 else None for i, p in enumerate(places)
        ],
        "top_context_offset": [min(int(p) - 1, RADIUS) if density[i] > 0 else None for i, p in enumerate(places)],
        "top_activation": [float(p) if p > 0 else None for p in peak],
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return {**columns, "residue": [proteins[i][p - 1] for i, p in enumerate(places)]}


def write_run(folder: Path, *, demo: bool = False) -> Path:
    """A finished SAE run with every part."""
    folder.mkdir(parents=True)
    (folder / "resolved.yaml").write_text(RESOLVED, encoding="utf-8")
    versions = {"plmsae": "0.1.0", "torch": "2.13.0", "numpy": "2.4.6", "litdata": "0.2.76"}
    write_json(
        folder / "environment.json",
        {
            "python": "3.11.9", "platform": "Linux-6.1.0-x86_64-with-glibc2.36", "cpus": 8,
            "device": "NVIDIA H100 80GB HBM3", "versions": versions,
            "commit": "3f9c2ab471d0e8b65c1f0a9d2e7b8c4411aa0f3e", "dirty": False,
        },
    )  # fmt: skip
    artifacts = {
        stage: {"folder": f"runs/data/{stage}-{key}", "key": key, "rows": 198_877}
        for stage, key in (
            ("embed", "9f2c1d7be04a8813"),
            ("shuffle", "0b7e55a1c2d94f60"),
            ("optimize", "e1186f3f7f20ab9c"),
        )
    }
    write_json(folder / "artifacts.json", artifacts)
    config = {"architecture": "topk", "num_latents": 2560, "k": 32}
    weights = {"name": "esm2_t6_8M_UR50D", "sha256": "a3f0c6d1b25e" + "0" * 52}
    write_json(
        folder / "sae" / "sae.json",
        {
            "format": "plmsae.sae/1", "config": config, "layer": 3, "weights": weights,
            "dataset_rows": 198_877, "gamma": 1.83, "tokens": 4_096_000,
        },
    )  # fmt: skip
    seconds = {"embed": 64.2, "shuffle": 3.41, "optimize": 2.6, "train": 143.0, "eval": 21.7}
    write_json(folder / "status.json", {"schema": 1, "state": "done", "stage_seconds": seconds})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in sae_lines()), encoding="utf-8")
    write_json(folder / "eval" / "metrics.json", scores(demo))
    write_latents(folder / "eval" / "latents.parquet")
    return folder


def write_bare(folder: Path, *, plm: bool = False) -> Path:
    """A run that has begun, or one that trains a protein language model."""
    folder.mkdir()
    if plm:
        train = "{kind: plm, plm: {architecture: esm2, fasta: a.fa}}"
        text = f"name: plm-8m\nmodel: {{weights: bundled}}\ntrain: {train}\n"
        (folder / "resolved.yaml").write_text(text, encoding="utf-8")
        lines = "".join(json.dumps(line) + "\n" for line in plm_lines())
        (folder / "metrics.jsonl").write_text(lines, encoding="utf-8")
    else:
        (folder / "resolved.yaml").write_text("name: nothing-yet\n", encoding="utf-8")
    return folder


def write_sweep(folder: Path) -> Path:
    """Nine trials over k and width; one failed, one has a page of its own."""
    folder.mkdir(parents=True)
    (folder / "resolved.yaml").write_text(RESOLVED, encoding="utf-8")
    trials: list[dict[str, Any]] = []
    for width in (1280, 2560, 5120):
        for k in (16, 32, 64):
            fvu = 0.9 * k**-0.4 * (width / 1280) ** -0.2
            metrics = {
                "fvu": fvu,
                "l0_mean": float(k),
                "dead_share": 0.004 * width / 1280,
                "recovered_zero": 1 - fvu / 4,
            }
            values = {"train.sae.k": k, "train.sae.num_latents": width}
            trials.append({"hash": f"{width}{k:08d}", "values": values, "state": "done", "metrics": metrics})
    trials[-1].update(state="failed", metrics={})
    write_json(
        folder / "sweep.json",
        {
            "grid": {"train.sae.k": [16, 32, 64], "train.sae.num_latents": [1280, 2560, 5120]},
            "trials": trials,
        },
    )
    page = folder / "trials" / trials[0]["hash"] / "report" / "index.html"
    page.parent.mkdir(parents=True)
    page.write_text("a trial's page", encoding="utf-8")
    return folder


VOID = {"meta", "br", "img", "input", "hr", "link"}


class Page(HTMLParser):
    """A parsed page. `elements`: (tag, attributes) in order; `texts`: the text outside style and script."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.raw: dict[str, list[str]] = {"style": [], "script": []}
        self.open: list[str] = []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in self.raw:
            self.raw[self.open[-1]].append(data)
        elif data.strip():
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(self.texts)

    def attributes(self, name: str) -> list[str]:
        """Values of the attribute of this name, wherever it stands."""
        return [attrs[name] for _, attrs in self.elements if name in attrs]

    def ids(self) -> list[str]:
        return self.attributes("id")


@pytest.fixture(scope="session")
def make() -> ModuleType:
    """This module: the writers of run folders and the reader of pages."""
    return sys.modules[__name__]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "esm2-8m-l3-topk")


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    return write_sweep(tmp_path / "sweep-k")
