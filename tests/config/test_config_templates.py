"""Templates and examples: valid as they are, complete where they promise it."""

from __future__ import annotations

from pathlib import Path

import pytest

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.config.templates import NAMES, full_template, template
from plmsae_cli.config.tree import entries
from plmsae_cli.config.yaml import load

EXAMPLES = sorted((Path(__file__).parents[2] / "experiments").rglob("*.yaml"))


def loaded(folder: Path, text: str) -> Experiment:
    path = folder / "exp.yaml"
    path.write_text(text, encoding="utf-8")
    return load(path).experiment


@pytest.mark.parametrize(("name", "stages"), [
    ("sae", ["embed", "shuffle", "optimize", "train", "eval"]),
    ("plm", ["train"]),
    ("sweep", ["embed", "shuffle", "optimize", "sweep", "eval"]),
    ("search", ["embed", "shuffle", "optimize", "sweep", "eval"]),
    ("imported", ["embed", "shuffle", "optimize", "train", "eval"]),
])  # fmt: skip
def test_templates_are_experiments(name: str, stages: list[str], tmp_path: Path) -> None:
    assert template(name).startswith("# yaml-language-server: $schema=plmsae.schema.json\n")
    assert loaded(tmp_path, template(name)).stages() == stages


def test_a_newcomer_edits_few_lines() -> None:
    lines = [line.partition("#")[0].strip() for line in template("sae").splitlines()]
    assert len([line for line in lines if line and not line.endswith((":", "{}"))]) <= 10


def test_unknown_template() -> None:
    with pytest.raises(UserError, match="no template big"):
        template("big")
    assert len(NAMES) == 5


def test_full_template_is_every_field_at_its_default(tmp_path: Path) -> None:
    text = full_template()
    experiment = loaded(tmp_path, text)
    bare = "embed: {fasta: proteins.fasta.gz, layers: [6]}\nshuffle: {}\noptimize: {}\ntrain: {sae: {}}\neval: {}\n"
    assert experiment == loaded(tmp_path, bare)
    words = " ".join(line.strip().lstrip("# ") for line in text.splitlines())
    for path, entry in entries().items():
        assert f"{path.rpartition('.')[2]}:" in text
        assert entry.help in words


def test_what_is_commented_out_in_it_is_valid_too(tmp_path: Path) -> None:
    off = [line for line in full_template().splitlines() if line.lstrip().startswith("# ")]
    sections: dict[str, list[str]] = {}
    for line in off:
        body = line.replace("# ", "", 1)
        if body.strip().startswith("#"):
            continue
        if body.strip() in {"plm:", "sweep:"}:
            sections[body.strip()] = []
        # Less deep are the helps of fields that are not commented out.
        if (sections and body.startswith("    ")) or body.strip() in sections:
            sections[list(sections)[-1]].append(body)
    plm = "\n".join(sections["plm:"])
    assert "num_layers: 6" in plm
    assert loaded(tmp_path, f"train:\n  kind: plm\n  batch_tokens: 16384\n{plm}\n").train is not None


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_are_experiments_named_as_their_files(path: Path) -> None:
    experiment = load(path).experiment
    assert experiment.name == path.stem
    schema = path.read_text(encoding="utf-8").splitlines()[0].partition("$schema=")[2]
    assert (path.parent / schema).is_file()


def test_examples_share_their_data() -> None:
    one, many = (load(path).experiment for path in EXAMPLES if path.stem in {"esm2-650m-l24-topk", "sweep-k"})
    for section in ("model", "embed", "shuffle", "optimize"):
        assert getattr(one, section) == getattr(many, section)


def test_the_examples_are_there() -> None:
    names = {path.stem for path in EXAMPLES}
    assert {"esm2-650m-l24-topk", "saefold-3b-l36-matryoshka", "sweep-k"} <= names
