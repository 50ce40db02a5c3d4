"""How soon the first page of 40,960 latents stands in Chromium, served from this machine.

The index is that of made-up latents: a concept with F1 for two of three, of 1,000 concepts, a family for one of three, patterns,
a map of eight clusters. Pages of single latents are not built: the first page loads none. Median of several fresh browsers.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
from pathlib import Path
from typing import Any

import numpy as np

from plmsae_cli.browse.features import Features
from plmsae_cli.browse.index import index_body
from plmsae_cli.browse.layout import CLUSTERS, Layout
from plmsae_cli.browse.server import Server
from plmsae_cli.browse.site import GROUP, write_index, write_static

LATENTS, TIMES = 40_960, 7
CHROMIUM = os.environ.get("PLMSAE_CHROMIUM", "/usr/bin/chromium")
# Milliseconds from the request to the frame in which points are drawn and the table has rows.
STANDS = """() => {
  const look = () => {
    const canvas = document.querySelector("canvas");
    if (canvas && canvas.width > 300 && document.querySelector(".table tbody a")) {
      requestAnimationFrame(() => setTimeout(() => { window.stands = performance.now(); }));
    } else requestAnimationFrame(look);
  };
  requestAnimationFrame(look);
}"""

WAIT = """() => new Promise((done) => {
  const look = () => (window.stands ? done(window.stands) : setTimeout(look, 20));
  look();
})"""


def made() -> tuple[Features, Layout]:
    """The latents, and where they lie."""
    draw = np.random.default_rng(0)
    index: dict[str, Any] = {
        "run": "forty thousand", "demo": False, "model": {"name": "esm2_650m"}, "layer": 24, "num_layers": 33,
        "architecture": "topk", "k": 64, "num_latents": LATENTS, "rows": 20_000_000, "proteins": 60_000,
        "bands": [0, 0.25, 0.5, 0.75], "one_per": "protein", "letters": "ACDEFGHIKLMNPQRSTVWY",
        "letter_shares": [0.05] * 20, "mean_length": 420.0, "concepts": {"thresholds": [j / 100 for j in range(100)]},
    }  # fmt: skip
    latents = {
        "density": (10 ** draw.normal(-3, 0.8, LATENTS)).clip(0, 1).tolist(),
        "max": draw.gamma(4, 1, LATENTS).tolist(),
        "letters": list(draw.dirichlet(np.full(20, 0.3), LATENTS)),
    }
    concepts = [f"Domain [FT]: made-up domain number {n}" for n in range(1000)]
    named = draw.random(LATENTS) < 2 / 3
    families = draw.random(LATENTS) < 1 / 3
    found: dict[str, list[Any]] = {
        "concept": [
            concepts[n] if yes else None for n, yes in zip(draw.integers(0, 1000, LATENTS), named, strict=True)
        ],
        "concept_f1": [float(f) if yes else None for f, yes in zip(draw.beta(1, 3, LATENTS), named, strict=True)],
        "family": [
            f"PF{n:05}" if yes else None for n, yes in zip(draw.integers(0, 9000, LATENTS), families, strict=True)
        ],
        "family_f1": [float(f) if yes else None for f, yes in zip(draw.beta(2, 3, LATENTS), families, strict=True)],
        "pattern": [("point", "short", "long", "whole")[n] for n in draw.integers(0, 4, LATENTS)],
    }
    cluster_N = draw.integers(0, CLUSTERS, LATENTS)
    place_N2 = (draw.normal(0, 0.08, (LATENTS, 2)) + draw.random((CLUSTERS, 2))[cluster_N]).clip(0, 1)
    return Features(Path(), index, latents, found, {}, {}), Layout(place_N2.astype(np.float32), cluster_N)


def first_page(line: dict[str, str]) -> dict[str, Any]:
    """The row for results.jsonl."""
    from playwright.sync_api import sync_playwright

    features, layout = made()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_static(folder, [features.index["run"]], "benchmark")
        write_index(folder / "data" / "0", "0", index_body(features, layout, GROUP, 0))
        size = (folder / "data" / "0" / "index.js").stat().st_size
        waits, paints = [], []
        with Server(folder, "127.0.0.1", 0, lambda run, text: {}) as server, sync_playwright() as driver:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            for _ in range(TIMES):
                browser = driver.chromium.launch(
                    executable_path=CHROMIUM, args=["--no-sandbox", "--enable-unsafe-swiftshader"]
                )
                page = browser.new_page(viewport={"width": 1280, "height": 850})
                page.add_init_script(f"({STANDS})()")
                page.goto(server.address)
                waits.append(page.evaluate(WAIT) / 1000)
                paints.append(
                    page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime") / 1000
                )
                version = browser.version
                browser.close()
            server.shutdown()
    note = (
        f"{LATENTS:,} latents, index of {size / 1e6:.1f} MB; median of {TIMES}, {min(waits):.2f} to {max(waits):.2f} s; first"
        f" paint {statistics.median(paints):.2f} s; Chromium {version}, load {os.getloadavg()[0]:.1f}"
    )
    row = {
        "name": "features/first-page", "who": "plmsae", "value": round(statistics.median(waits), 3), "unit": "s", **line,
        "note": note,
    }  # fmt: skip
    print(row)
    return row
