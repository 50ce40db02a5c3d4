"""The pages of docs/: fresh, whole, and true where a machine can tell."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import typer

import plmsae_cli
from plmsae_cli.cli.app import app
from plmsae_cli.cli.exits import MEANINGS
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.config.yaml import load
from plmsae_cli.executors.pipeline import run_experiment
from plmsae_cli.runtime.progress import PlainReporter

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
SMOKE = Path(plmsae_cli.__file__).parent / "data" / "smoke.fasta.gz"

TESTED = re.compile(r"^<!-- tested -->\n```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXPERIMENT = re.compile(
    r"^```yaml\n((?:name|embed|train|storage|data_root|shuffle|optimize|eval):.*?)^```$", re.M | re.S
)
FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
TYPED = re.compile(r"^\$ plmsae (.+)$", re.MULTILINE)
NAMED = re.compile(r"`plmsae ([a-z]+[^`\n]*)`")


def text(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def snippets(name: str) -> list[str]:
    return TESTED.findall(text(name))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the finished run that the pages speak of, `runs/first`, of a few proteins."""
    folder = tmp_path_factory.mktemp("docs")
    body: dict[str, Any] = {
        "name": "first",
        "root": str(folder / "runs"),
        "embed": {"fasta": str(SMOKE), "layers": [5]},
        "shuffle": {},
        "optimize": {"block_rows": 256},
        "train": {"sae": {"k": 8, "expansion": 4}, "tokens": 20_480, "batch_tokens": 256, "lr": 1e-3},
        "eval": {"fidelity": {"proteins": 4}},
    }
    experiment = Experiment.model_validate(body)
    run_experiment(experiment, experiment.stages(), PlainReporter())
    return folder


@pytest.mark.parametrize("name", ["notebooks.md", "data-formats.md"])
def test_snippets_run_one_after_the_other(
    name: str, finished: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    if name == "data-formats.md":
        pytest.importorskip("litdata")
    monkeypatch.chdir(finished)
    monkeypatch.setenv("DATA_OPTIMIZER_CACHE_FOLDER", str(tmp_path))
    found = snippets(name)
    assert len(found) >= 4
    namespace: dict[str, Any] = {}
    for snippet in found:
        exec(compile(snippet, name, "exec"), namespace)  # noqa: S102 our own pages


def test_the_readme_example_encodes_every_residue(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (snippet,) = TESTED.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    monkeypatch.chdir(finished)
    namespace: dict[str, Any] = {}
    exec(compile(snippet.replace("runs/quickstart", "runs/first"), "README.md", "exec"), namespace)  # noqa: S102
    (sequence,) = re.findall(r'encode\("([A-Z]+)"\)', snippet)
    assert namespace["activations"].shape == (len(sequence), 192)
    assert namespace["latents"].acts_BK.shape == (len(sequence), 8)
    assert (namespace["latents"].acts_BK > 0).any()


def test_the_example_architecture_is_a_dictionary_that_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from plmsae_cli.sae.architectures import ARCHITECTURES
    from plmsae_cli.sae.export import from_state, to_state

    (snippet,) = snippets("architectures.md")
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(compile(snippet, "architectures.md", "exec"), namespace)  # noqa: S102
    kind = namespace["ReLULog"]
    monkeypatch.setitem(ARCHITECTURES, "relu_log", kind)
    model = kind(8, 32, 0.4)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    model.normalize_decoder()
    x_BD, dead_N = torch.randn(20, 8), torch.zeros(32, dtype=torch.bool)
    whole = model.loss(x_BD, dead_N, 20)
    z_BN = ((x_BD - model.b_dec_D) @ model.w_enc_ND.T + model.b_enc_N).relu()
    error = (z_BN @ model.w_dec_ND + model.b_dec_D - x_BD).square().mean()
    torch.testing.assert_close(whole.total, error + 0.4 * (1 + z_BN).log().sum(1).mean() / 8)
    halves = [model.loss(rows, dead_N, 20).total for rows in x_BD.split(10)]
    torch.testing.assert_close(sum(halves), whole.total)
    assert torch.equal(from_state(*to_state(model))(x_BD), model(x_BD))


def test_the_example_evaluation_counts_what_fires(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet as pq

    from plmsae_cli.runtime.saved import load_sae
    from plmsae_cli.store.activations import ActivationShards
    from plmsae_cli.store.fs import Store

    (snippet,) = snippets("add-an-evaluation.md")
    namespace: dict[str, Any] = {"__name__": "example"}
    exec(compile(snippet, "add-an-evaluation.md", "exec"), namespace)  # noqa: S102
    (dataset,) = finished.glob("runs/data/optimize-*")
    shards = ActivationShards(Store(), str(dataset), heldout=True)
    figures = namespace["usage"](load_sae(finished / "runs/first"), shards, shards.stop)
    density = pq.read_table(finished / "runs/first/eval/latents.parquet")["density"].to_numpy()
    shares = density[density > 0] / density.sum()
    assert figures["latents"] == len(shares)
    assert figures["effective"] == pytest.approx(2.0 ** -(shares * np.log2(shares)).sum(), rel=1e-6)


def _fields() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_fields", DOCS / "fields.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_of_fields_is_fresh() -> None:
    page = text("yaml.md")
    assert page == _fields().refreshed(page), "run: python docs/fields.py"
    assert "| `lr` ● |" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    body = FENCED.sub("", page.read_text(encoding="utf-8"))
    for link in LINK.findall(body):
        if re.match(r"[a-z]+:", link):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in _anchors(file), f"{page.name}: {link}"


def _anchors(page: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    body = FENCED.sub("", page.read_text(encoding="utf-8"))
    titles = re.findall(r"^#+ (.*)$", body, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_verb_has_its_page_and_every_page_its_line_in_the_index() -> None:
    index = text("README.md")
    tools = re.findall(r"^## (\w+)$", text("tools.md"), re.MULTILINE)
    for verb in COMMANDS:
        assert (DOCS / f"{verb}.md").exists() or verb in tools, f"no page tells of `plmsae {verb}`"
    linked = set(LINK.findall(index))
    missing = {page.name for page in DOCS.glob("*.md")} - linked - {"README.md"}
    assert not missing


def _commands() -> Iterator[tuple[str, str]]:
    """What pages show as typed, and what their own words name; not what a program printed."""
    for page in PAGES:
        body = page.read_text(encoding="utf-8")
        for line in [*TYPED.findall(body), *NAMED.findall(FENCED.sub("", body))]:
            yield page.name, line


def test_every_command_line_on_the_pages_is_one() -> None:
    found = list(_commands())
    assert len(found) > 40
    for page, line in found:
        words = shlex.split(re.split(r" (?:&&|\||2>|>|#) ?", line)[0])
        assert words[0] in COMMANDS, f"{page}: plmsae {line}"
        if len(words) > 1:
            COMMANDS[words[0]].make_context(words[0], words[1:])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_experiment_on_the_pages_has_known_fields(page: Path, tmp_path: Path) -> None:
    """A page shows the sections it is about: the others are added, so that only what is shown can be wrong."""
    for number, shown in enumerate(EXPERIMENT.findall(page.read_text(encoding="utf-8"))):
        sections = set(re.findall(r"^(\w+):", shown, re.MULTILINE))
        extra = "" if "train" in sections and re.search(r"\b(data|kind): \S", shown) else _rest(sections)
        file = tmp_path / f"{page.stem}-{number}.yaml"
        file.write_text(shown + extra, encoding="utf-8")
        load(file)


def _rest(sections: set[str]) -> str:
    rest = {"embed": "{fasta: a.fasta, layers: [5]}", "shuffle": "{}", "optimize": "{}", "train": "{}"}
    return "".join(f"\n{name}: {body}" for name, body in rest.items() if name not in sections) + "\n"


def test_exit_codes_are_those_of_the_program() -> None:
    assert re.findall(r"^\| (\d+) \| (.*) \|$", text("run.md"), re.MULTILINE) == [
        (str(code), meaning) for code, meaning in MEANINGS.items()
    ]
