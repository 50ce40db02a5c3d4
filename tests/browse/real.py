"""Two runs of every stage on proteins of the package, through the bundled model: what the pages are made for."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

PROTEINS, LAYER = 150, 4
# Kyte and Doolittle 1982.
HYDROPATHY = dict(zip(
    "ARNDCQEGHILKMFPSTWYV",
    (1.8, -4.5, -3.5, -3.5, 2.5, -3.5, -3.5, -0.4, -3.2, 4.5, 3.8, -3.9, 1.9, 2.8, -1.6, -0.8, -0.7, -0.9, -1.3, 4.2),
    strict=True,
))  # fmt: skip
YAML = """
root: runs
data_root: data
model: {weights: bundled}
embed: {fasta: proteins.fasta, layers: [%d], holdout: 0.1}
shuffle: {}
optimize: {}
train:
  seed: %d
  sae: {architecture: topk, num_latents: 384, k: 16}
  batch_tokens: 512
  tokens: 100_000
eval:
  fidelity: {loss_recovered: false}
  concepts: {annotations: annotated.tsv, min_instances: 10, keep_instances: 10, mode: interplm_compat, nulls: []}
  features: {top: 10, random: 5, latents_per_group: 100}
"""


def greasy(sequence: str) -> Iterator[tuple[int, int]]:
    """Stretches (from 1) of which each residue is the middle of 9 with a mean hydropathy above 1.6."""
    value = [HYDROPATHY.get(letter, 0.0) for letter in sequence]
    above = [i for i in range(4, len(value) - 4) if sum(value[i - 4 : i + 5]) > 1.6 * 9]
    for _, part in groupby(enumerate(above), lambda one: one[1] - one[0]):
        places = [i for _, i in part]
        yield places[0] + 1, places[-1] + 1


def annotated(proteins: Sequence[tuple[str, str, str]]) -> str:
    """A UniProtKB table of what their sequences tell: greasy stretches, and sequons of N-glycosylation as sites."""
    lines = ["Entry\tSequence\tTransmembrane\tGlycosylation"]
    for number, (_, _, text) in enumerate(proteins):
        stretches = "; ".join(f'TRANSMEM {a}..{b}; /note="Helical"' for a, b in greasy(text))
        sequons = [i for i in range(len(text) - 2) if text[i] == "N" and text[i + 1] != "P" and text[i + 2] in "ST"]
        sites = "; ".join(f'CARBOHYD {i + 1}; /note="N-linked (GlcNAc...) asparagine"' for i in sequons)
        lines.append(f"A{number}\t{text}\t{stretches}\t{sites}")
    return "\n".join(lines) + "\n"


def run_both(root: Path, proteins: Sequence[tuple[str, str, str]]) -> list[Path]:
    """The folders of two runs, which differ in their seeds."""
    from plmsae_cli.cli.app import app

    fasta = "".join(f">{name} {header}\n{sequence}\n" for name, header, sequence in proteins)
    (root / "proteins.fasta").write_text(fasta, encoding="utf-8")
    (root / "annotated.tsv").write_text(annotated(proteins))
    before = Path.cwd()
    os.chdir(root)
    try:
        for seed, name in enumerate(("first", "second")):
            Path(f"{name}.yaml").write_text(YAML % (LAYER, seed))
            code = app(["run", f"{name}.yaml", "--no-progress"], prog_name="plmsae", standalone_mode=False)
            assert not code, f"plmsae run {name}.yaml: exit code {code}"
    finally:
        os.chdir(before)
    return [root / "runs" / name for name in ("first", "second")]
