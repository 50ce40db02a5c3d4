"""Pages of two small dictionaries on real activations of the bundled model, of two real runs, and a browser to look at them."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import plmsae_cli
from plmsae_cli.browse.encoder import Encoder
from plmsae_cli.browse.server import Server, sequence_reader
from plmsae_cli.browse.site import build_site
from plmsae_cli.plm.alphabet import encode, pack
from plmsae_cli.runtime.models import load_plm
from plmsae_cli.sae.dictionary import Dictionary
from plmsae_cli.sae.export import to_state
from plmsae_cli.sae.topk import TopK
from plmsae_cli.store.fasta import records
from plmsae_cli.store.fs import Store
from plmsae_cli.store.tensorfile import write_tensors
from plmsae_cli.store.weights import resolve_weights

LATENTS, D, LAYER = 48, 192, 5
EFFECTS = [0.1 * (i - 8) for i in range(20)]
PATIENCE_MS = 240_000
HOSTILE = '<img src=x onerror="window.hacked=1"></script><script>window.hacked=1</script>\u2028=1+1'
CHROMIUM = Path(os.environ.get("PLMSAE_CHROMIUM", "/usr/bin/chromium"))
PROTEINS = Path(plmsae_cli.__file__).parent / "data" / "proteins.fasta.gz"


_NAMES = [
    "ALA",
    "CYS",
    "ASP",
    "GLU",
    "PHE",
    "GLY",
    "HIS",
    "ILE",
    "LYS",
    "LEU",
    "MET",
    "ASN",
    "PRO",
    "GLN",
    "ARG",
    "SER",
    "THR",
    "VAL",
    "TRP",
    "TYR",
]


@lru_cache
def beside(name: str) -> Any:
    """A module beside this file: tests are not a package."""
    import importlib.util

    spec = importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Made:
    """What the pages were made from."""

    runs: list[Path]
    site: Path
    proteins: Mapping[int, tuple[str, str, str]]
    """Id, header and sequence of those with an example, by their number in the first run."""
    hostile: int
    """The protein with a header that would run a script."""
    helix: int
    """The protein with a structure."""
    order: torch.Tensor | None
    """Latent i of the second dictionary is latent order[i] of the first; None where they are not the same latents."""
    scores: Callable[[dict[str, Any], int], tuple[float, float, float]]
    """Precision, recall and F1 of a row of concepts.parquet above a threshold."""


_THREE = dict(zip("ACDEFGHIKLMNPQRSTVWY", _NAMES, strict=True))


def helix(sequence: str) -> str:
    """An ideal alpha helix as a PDB file: backbone atoms on screws of 100 degrees and 1.5 angstrom a residue."""
    # Radius, turn in degrees and rise of each atom.
    names = {
        "N": (1.55, -28, -0.9),
        "CA": (2.28, 0, 0),
        "C": (1.68, 27, 1.05),
        "O": (2.03, 24, 2.25),
        "CB": (3.3, 5, -0.6),
    }
    lines, serial = [], 0
    for i, letter in enumerate(sequence):
        for name, (radius, turn, rise) in names.items():
            serial += 1
            angle = torch.deg2rad(torch.tensor(100.0 * i + turn))
            x, y, z = float(radius * angle.cos()), float(radius * angle.sin()), 1.5 * i + rise
            place = f"{x:8.3f}{y:8.3f}{z:8.3f}"
            lines.append(
                f"ATOM  {serial:5}  {name:<3} {_THREE[letter]} B{i + 101:4}    {place}  1.00  0.00           {name[0]}"
            )
    return "\n".join([*lines, "TER", "END", ""])


def save_run(run: Path, sae: Dictionary) -> None:
    """The parts of a run that pages read: its settings and its dictionary."""
    weights = resolve_weights("bundled", Store())
    state, config = to_state(sae)
    write_tensors(Store(), str(run / "sae" / "sae.safetensors"), state, {"format": "plmsae.sae/1"})
    facts = {
        "format": "plmsae.sae/1", "config": config, "layer": LAYER, "num_layers": 8,
        "weights": {"name": "bundled", "sha256": weights.sha256},
    }  # fmt: skip
    (run / "sae" / "sae.json").write_text(json.dumps(facts))
    (run / "resolved.yaml").write_text(f"name: {run.name}\nmodel: {{weights: bundled}}\nembed: {{compute: auto}}\n")


def found_table(run: Path, latents: int) -> None:
    """eval/latents.parquet as the axes leave it: concept and F1 from the features' own counts, two families and patterns."""
    rows = pq.read_table(run / "eval" / "features" / "concepts.parquet").to_pylist()
    best = {row["latent"]: row for row in reversed(rows) if row["rank"] == 1}
    table: dict[str, list[Any]] = {
        key: [] for key in ("latent", "concept", "concept_f1", "concept_threshold", "family", "family_f1", "pattern")
    }
    for n in range(latents):
        row = best.get(n)
        j = round(row["threshold"] * 100) if row else 0
        table["latent"].append(n)
        table["concept"].append(row["concept"] if row else None)
        table["concept_f1"].append(beside("planted").scores(row, j)[2] if row else None)
        table["concept_threshold"].append(row["threshold"] if row else None)
        table["family"].append("PF00069" if n % 5 == 0 else None)
        table["family_f1"].append(0.8 if n % 5 == 0 else None)
        table["pattern"].append("point" if n % 2 else "short")
    table["probe_targets"] = [
        "Helix; Domain: made up" if n % 3 == 0 else "Helix" if n % 3 == 1 else None for n in range(latents)
    ]
    steered = ablated(run, best)
    for name, value in {"kl": 0.25, "kl_direction": 0.05, "size": 1.5, "q": 0.01}.items():
        table[f"steering_{name}"] = [value if n == steered else None for n in range(latents)]
    pq.write_table(pa.table(table), run / "eval" / "latents.parquet")


def ablated(run: Path, best: dict[int, Any]) -> int:
    """eval/steering of one latent, taken away; which is returned."""
    folder, latent = run / "eval" / "steering", min(best)
    folder.mkdir(exist_ok=True)
    (folder / "result.json").write_text(json.dumps({"mode": "ablate", "residues": "active", "proteins": 9}))
    rows = [
        {"latent": latent, "strength": strength, "readout": readout,
         "effect": strength * value, "direction": -value / 4, "q": 0.5}
        for strength in (0.5, 1.0)
        for readout, value in [("KL", 9.0), *zip("ACDEFGHIKLMNPQRSTVWY", EFFECTS, strict=True)]
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), folder / "effects.parquet")
    return latent


def chosen_proteins(number: int, longest: int) -> list[tuple[str, str, str]]:
    """Proteins of the package; the first has a hostile header, the second the id of the structure."""
    proteins = [one for one in records(PROTEINS) if 60 <= len(one[2]) <= longest][:number]
    proteins[0] = (proteins[0][0], HOSTILE, proteins[0][2])
    letters = "".join(c for c in proteins[1][2] if c in "ACDEFGHIKLMNPQRSTVWY")
    proteins[1] = ("own|P12345|HELIX", "a made-up helix", letters)
    return proteins


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    root = tmp_path_factory.mktemp("browse")
    proteins = chosen_proteins(30, 300)
    generator = torch.Generator().manual_seed(0)
    first = TopK(D, LATENTS, k=6)
    packed = pack([encode(sequence) for _, _, sequence in proteins])
    with torch.no_grad():
        hidden = load_plm("bundled")(packed.tokens_T, packed.documents, layers=[LAYER]).hidden[LAYER]
        first.b_dec_D.copy_(hidden.mean(0))
        first.w_dec_ND.copy_(torch.nn.functional.normalize(torch.randn(LATENTS, D, generator=generator), dim=1))
        first.w_enc_ND.copy_(first.w_dec_ND)
        first.maximum_N.fill_(1.0)
    order = torch.randperm(LATENTS, generator=generator)
    runs = [root / "first", root / "second"]
    save_run(runs[0], first)
    raw = Encoder(runs[0]).latents([sequence for _, _, sequence in proteins])
    acts_RN = beside("planted").dense(raw.acts_BK, raw.indices_BK, LATENTS)
    second = TopK(D, LATENTS, k=6)
    with torch.no_grad():
        first.maximum_N.copy_(torch.from_numpy(acts_RN).amax(0))
        second.b_dec_D.copy_(first.b_dec_D)
        for name in ("w_enc_ND", "w_dec_ND", "b_enc_N", "maximum_N"):
            getattr(second, name).copy_(getattr(first, name)[order])
    # A concept that one latent finds in part: every residue of proteins 0 to 19 where it is above half of its maximum, and
    # those next to it; and the residues of cysteine.
    chosen = int((acts_RN > 0).sum(0).argmax())
    ranges, start = [], 0
    for p, (_, _, sequence) in enumerate(proteins[:20]):
        for i, letter in enumerate(sequence):
            if acts_RN[start + i, chosen] > 0.5 * float(first.maximum_N[chosen]):
                ranges.append((p, "Domain [FT]: made up", max(1, i), min(len(sequence), i + 2)))
            if letter == "C":
                ranges.append((p, "Modified residue: any", i + 1, i + 1))
        start += len(sequence)
    by_residue = frozenset({"Modified residue: any"})
    for run, sae, acts in ((runs[0], first, acts_RN), (runs[1], second, acts_RN[:, order.numpy()])):
        save_run(run, sae)
        beside("planted").write_features(run, sae, proteins, acts, ranges, by_residue, name=run.name)
        found_table(run, LATENTS)
    (root / "P12345.pdb").write_text(helix(proteins[1][2]))
    site = root / "site"
    build_site(runs, site, [str(root / "P12345.pdb")])
    return Made(runs, site, dict(enumerate(proteins)), 0, 1, order, beside("planted").scores)


@pytest.fixture(scope="session")
def real(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The pages of two runs of every stage, concepts and features."""
    root = tmp_path_factory.mktemp("real")
    runs = beside("real").run_both(root, chosen_proteins(beside("real").PROTEINS, 200))
    rows = pq.read_table(runs[0] / "eval" / "features" / "examples" / "proteins.parquet").to_pylist()
    proteins = {row["protein"]: (row["id"], row["header"], row["sequence"]) for row in rows}
    hostile = next(number for number, protein in proteins.items() if "<script>" in protein[1])
    helical = next(number for number, protein in proteins.items() if protein[0] == "own|P12345|HELIX")
    (root / "P12345.pdb").write_text(helix(proteins[helical][2]))
    build_site(runs, root / "site", [str(root / "P12345.pdb")])
    return Made(runs, root / "site", proteins, hostile, helical, None, beside("planted").scores)


@pytest.fixture(scope="session", params=["made", pytest.param("real", marks=pytest.mark.slow)])
def built(request: pytest.FixtureRequest) -> Made:
    """Either site."""
    found: Made = request.getfixturevalue(request.param)
    return found


@pytest.fixture(scope="session")
def served(built: Made) -> Iterator[str]:
    """Address of the pages with their server."""
    with Server(built.site, "127.0.0.1", 0, sequence_reader(built.runs)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.address
        server.shutdown()


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="Playwright is not installed: pip install 'plmsae[dev]'"
    )
    if not CHROMIUM.exists():
        pytest.skip(f"no Chromium at {CHROMIUM}: apt-get install chromium, or set PLMSAE_CHROMIUM")
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--enable-unsafe-swiftshader"]
        )
        yield opened
        opened.close()


@pytest.fixture
def plain_page(browser: Any) -> Iterator[Any]:
    """An empty page of some size, which may complain."""
    context = browser.new_context()
    context.set_default_timeout(PATIENCE_MS)
    yield context.new_page()
    context.close()


@pytest.fixture(params=[1280, 390], ids=["wide", "phone"])
def page(request: pytest.FixtureRequest, browser: Any) -> Iterator[Any]:
    """An empty page; at its end nothing was reported by the browser, and no script of a header ran."""
    context = browser.new_context(viewport={"width": request.param, "height": 850})
    context.set_default_timeout(PATIENCE_MS)
    opened = context.new_page()
    complaints: list[str] = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on(
        "console",
        lambda message: (
            complaints.append(message.text) if message.type == "error" and "422" not in message.text else None
        ),
    )
    yield opened
    assert complaints == []
    assert opened.evaluate("window.hacked") is None
    assert opened.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page scrolls sideways"
    context.close()
