"""Rows of a finished dataset traced back to their residues, and compared with a fresh pass of the model over those proteins.

    python benchmarks/trace.py exp.yaml [--rows 1000]

Places are drawn at random; the inverse of the shuffle's permutation tells each one's row, proteins.parquet the protein and the
residue. The model then reads that protein alone, in float32: a stored row differs by its rounding and by the order of additions.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from record import add, busy, cpu, stamp

from plmsae_cli.config.yaml import load
from plmsae_cli.plm.alphabet import encode, pack
from plmsae_cli.runtime.models import load_plm
from plmsae_cli.store.blocks import Blocks
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.permutation import Permutation
from plmsae_cli.store.proteins import locate_rows, read_proteins


def trace(config: Path, num_rows: int, seed: int) -> tuple[list[float], list[float], int]:
    """Relative L2 distance of each row to the fresh one, and to that of a random residue of the protein; number of proteins."""
    experiment, store = load(config).experiment, Store()
    assert experiment.embed is not None
    assert experiment.shuffle is not None
    layer = experiment.embed.layers[0]
    folder = Lineage(experiment, store).optimize(layer).folder
    blocks = Blocks(store, folder)
    draws = np.random.default_rng(seed)
    places = draws.choice(blocks.num_rows, num_rows, replace=False)
    rows = Permutation(blocks.num_rows, experiment.shuffle.seed, domain="shuffle").inverse(places)
    table = read_proteins(store, join(folder, "proteins.parquet"), split="train")
    protein, residue = locate_rows(table, rows)
    model = load_plm(experiment.model.weights, store)
    near, far = [], []
    for p in np.unique(protein):
        packed = pack([encode(table["sequence"][int(p)].as_py())])
        with torch.inference_mode():
            fresh_TD = model(packed.tokens_T, packed.documents, layers=[layer]).hidden[layer][1:-1].float()
        for i in np.flatnonzero(protein == p):
            stored_D = blocks.decode(blocks.read(int(places[i]), int(places[i]) + 1))[0]
            near.append(float((stored_D - fresh_TD[residue[i]]).norm() / fresh_TD[residue[i]].norm()))
            other_D = fresh_TD[draws.integers(len(fresh_TD))]
            far.append(float((stored_D - other_D).norm() / other_D.norm()))
    return near, far, len(np.unique(protein))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="data/trace", help="of the lines")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    near, far, proteins = trace(options.config, options.rows, options.seed)
    note = f"{options.rows:,} random rows of {proteins:,} proteins" + (f"; {beside}" if (beside := busy()) else "")
    shared = stamp("data-trace", cpu(1), f"python benchmarks/trace.py exp.yaml --rows {options.rows}")
    lines = [
        {
            "name": options.name,
            "who": who,
            "value": float(f"{value:.3g}"),
            "unit": "relative L2",
            "note": note,
            **shared,
        }
        for who, value in {
            "plmsae, largest distance to a fresh pass": max(near),
            "plmsae, median": float(np.median(near)),
            "another residue of the protein, median": float(np.median(far)),
        }.items()
    ]
    for line in lines:
        print(f"{line['who']:45} {line['value']} {line['unit']}  {line['note']}")
    if options.record:
        add(Path(__file__).with_name("results.jsonl"), lines)


if __name__ == "__main__":
    main()
