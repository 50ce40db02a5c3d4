"""Draws curve.svg from metrics.jsonl: `python docs/bundled-model/curve.py`."""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
UNIGRAM = 2.8896


def main() -> None:
    lines = [json.loads(line) for line in (FOLDER / "metrics.jsonl").read_text().splitlines()]
    train = [(line["tokens"] / 1e6, line["loss"]) for line in lines if "loss" in line]
    figure, axes = plt.subplots(figsize=(7, 3.6))
    axes.plot(*zip(*train, strict=True), color="#9aa0a6", linewidth=1, label="training (10 % of targets visible)")
    for name, colour in (("random", "#0072b2"), ("clusters", "#d55e00")):
        points = [(line["tokens"] / 1e6, line["valid"][name]["loss"]) for line in lines if "valid" in line]
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, label=f"held out: {name}")
    axes.axhline(UNIGRAM, color="black", linewidth=1, linestyle=":", label="residue frequencies alone")
    axes.set_xlabel("training tokens (millions)")
    axes.set_ylabel("cross-entropy at masked residues (nats)")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(FOLDER / "curve.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
