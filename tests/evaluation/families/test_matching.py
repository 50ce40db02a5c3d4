"""Latents and classes of hand-made proteins."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.evaluation.families import largest as module
from plmsae_cli.evaluation.families.matching import PAIR, intervals, match, tile_latents
from plmsae_cli.evaluation.protein_labels import classes, read_labels
from plmsae_cli.store.fs import Store


def test_a_planted_family_is_found_and_scored_on_the_other_half_alone() -> None:
    # 120 proteins, odd places test. Class 0: 0 to 59, class 1: the others.
    place = torch.arange(120)
    test_P = place % 2 == 1
    y_PL = torch.stack([place < 60, place >= 60], 1)
    acts = torch.zeros(3, 120)
    acts[0, :60] = 1 + torch.arange(60) / 100  # class 0
    acts[0, 61:81:2] = 2.0  # and ten of class 1, on test only
    acts[1, 60:] = 1.0  # class 1, all equal
    found = match(acts, y_PL, test_P, top=20)
    assert found.class_N.tolist() == [0, 1, -1]
    # Class 0 has 30 train proteins; the 20 strongest are held out and the other ten are told perfectly.
    assert found.f1_train_N[0] == 1.0
    assert float(found.threshold_N[0]) == 1.0
    # On test: 30 of class 0 and ten of class 1.
    assert (float(found.precision_N[0]), float(found.recall_N[0])) == (0.75, 1.0)
    assert float(found.f1_N[0]) == pytest.approx(2 * 0.75 / 1.75)
    assert float(found.f1_N[1]) == 1.0


def test_held_out_proteins_do_not_choose_the_threshold() -> None:
    # The 20 strongest train proteins are of the class; of the other 20 none is: there is nothing left to find.
    y_PL = (torch.arange(60) < 20)[:, None]
    test_P = torch.arange(60) >= 40
    acts = torch.linspace(2, 1, 60)[None]
    assert match(acts, y_PL, test_P, top=20).class_N.tolist() == [-1]
    assert match(acts, y_PL, test_P, top=None).class_N.tolist() == [0]


def test_only_the_top_proteins_classes_are_tried_as_published() -> None:
    # The strongest protein is the only one of class 1; class 0 would fit far better.
    y_PL = torch.zeros(40, 2, dtype=torch.bool)
    y_PL[1:20, 0] = True
    y_PL[0, 1] = True
    acts = torch.where(torch.arange(40) < 20, 1.0, 0.0)[None]
    acts[0, 0] = 5.0
    test_P = torch.arange(40) % 2 == 1
    assert match(acts, y_PL, test_P, top=None).class_N.tolist() == [1]
    assert match(acts, y_PL, test_P, top=20).class_N.tolist() == [-1]  # all train proteins of class 0 are held out


def test_equal_activations_are_not_parted_and_zero_is_no_threshold() -> None:
    y_PL = (torch.arange(40) < 10)[:, None]
    test_P = torch.arange(40) >= 20
    acts = torch.zeros(1, 40)
    acts[0, :15] = 1.0  # ten of the class and five others, all alike
    found = match(acts, y_PL, test_P, top=None)
    assert float(found.f1_train_N[0]) == pytest.approx(2 * (10 / 15) / (10 / 15 + 1))
    silent = match(torch.zeros(1, 40), y_PL, test_P, top=None)
    assert silent.class_N.tolist() == [-1]


def test_label_tables(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("P1\tGO:1, GO:2\nP2\tGO:1;GO:3\nP1\tGO:4\nP3\t\n")
    assert read_labels(tmp_path / "a.tsv") == {"P1": {"GO:1", "GO:2", "GO:4"}, "P2": {"GO:1", "GO:3"}, "P3": set()}
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(b'id,label\nP1,"Kinase, ATP"; SH2\n'))
    assert read_labels(tmp_path / "b.csv.gz")["P1"] == {"Kinase, ATP", "SH2"}
    names, y_PL = classes([{"x", "y"}, {"y"}, set()], 2)
    assert (names, y_PL.tolist()) == (["y"], [[True], [True], [False]])
    (tmp_path / "c.csv").write_text("P1\n")
    with pytest.raises(UserError, match=r"line 1 has no tab and no comma"):
        read_labels(tmp_path / "c.csv")


def test_intervals_are_those_of_proteins_drawn_one_by_one() -> None:
    """30 found rightly, 10 wrongly, 15 missed, 145 neither."""
    fires = torch.tensor([1] * 40 + [0] * 160, dtype=torch.bool)
    true = torch.tensor([1] * 30 + [0] * 10 + [1] * 15 + [0] * 145, dtype=torch.bool)
    counts = {name: torch.tensor([n]) for name, n in (("hits_N", 30), ("fired_N", 40), ("total_N", 45))}
    (found,) = intervals(counts, [0], 200, 0)
    drawn = torch.from_numpy(np.random.default_rng(0).integers(200, size=(4000, 200)))
    f1 = 2 * (fires & true)[drawn].sum(1) / (fires[drawn].sum(1) + true[drawn].sum(1))
    ends = torch.quantile(f1, torch.tensor([0.025, 0.975])).tolist()
    assert found == pytest.approx(ends, abs=0.02)
    nothing = {name: torch.tensor([0]) for name in counts}
    assert intervals(nothing, [0], 5, 0) == [[0.0, 0.0]]


def test_pieces_and_files_put_every_protein_in_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK_BYTES", 3 * 5 * 2)  # three proteins of five latents
    best_PN = torch.rand(23, 5).half()
    paths = []
    for piece in range(4):
        writer = module.Writer(Store(), str(tmp_path), f"{piece}of4")
        for some in torch.split(torch.arange(piece, 23, 4), 2):
            writer.add(some.tolist(), best_PN[some])
        writer.close()
        assert len(writer.files) > 1
        paths += [str(tmp_path / Path(file.name).name) for file in writer.files]
    assert torch.equal(module.Reader(Store(), paths, 23).tile(1, 4), best_PN.T[1:4].float())


def test_a_tile_has_a_bounded_number_of_pairs() -> None:
    for proteins, labels, top in ((50_000, 500, 20), (10, 100_000, 20), (10**9, 1, 1)):
        tile = tile_latents(proteins, labels, top)
        assert tile == 1 or tile * max(proteins, labels * top) <= 1 << 25


MATCH = """
import torch
from plmsae_cli.evaluation.families.matching import match

def held(name):
    return [int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name)][0]

def some(proteins):
    acts, labels = torch.rand(200, proteins), torch.rand(proteins, 30) < 0.1
    before = held("VmRSS") - acts.nbytes
    match(acts, labels, torch.arange(proteins) % 2 == 0, 20)
    return held("VmHWM") - before

some(100)
print(some(20_000))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_a_pair_takes_what_the_plan_reckons_with() -> None:
    settings = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "1000000"
    }  # what is freed goes back, as with tensors of a real size
    done = subprocess.run([sys.executable, "-c", MATCH], capture_output=True, text=True, check=True, env=settings)
    assert int(done.stdout) < 200 * 20_000 * PAIR < 1.8 * int(done.stdout)
