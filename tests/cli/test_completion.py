"""What Tab offers, asked as a shell asks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import plmsae_cli
from plmsae_cli.config.tree import entries

ASK = """
import sys
sys.argv = ['plmsae']
from plmsae_cli.cli.app import main
try: main()
finally: print(' '.join(sys.modules), file=sys.stderr)
"""


def offered(folder: Path, words: str) -> tuple[list[str], set[str]]:
    """The words that bash is given, and the packages that were imported."""
    environment = {
        **os.environ, "PYTHONPATH": str(Path(plmsae_cli.__file__).parents[1]), "_PLMSAE_COMPLETE": "complete_bash",
        "COMP_WORDS": f"plmsae {words}", "COMP_CWORD": str(len(words.split(" "))),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    modules = {name.split(".")[0] for name in done.stderr.split()}
    return done.stdout.split(), modules


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("work")
    for name in ("a.yaml", "b.yml", "notes.txt", "sub/c.yaml", "runs/first/status.json", "runs/sizes/status.json",
                 "runs/sizes/trials/0a1b/status.json"):  # fmt: skip
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    return place


@pytest.mark.parametrize(("words", "expected"), [
    ("comp", ["compare"]),
    ("run ", ["a.yaml", "b.yml", "runs/", "sub/"]),
    ("run sub/", ["sub/c.yaml"]),
    ("status ", ["first", "sizes"]),
    ("status sizes/", ["sizes/trials/0a1b"]),
    ("fetch unir", ["uniref50"]),
    ("init --kind s", ["sae", "sweep", "search"]),
    ("run a.yaml --set train.sae.k", ["train.sae.k=", "train.sae.k_aux=", "train.sae.k_start=", "train.sae.k_anneal="]),
    ("run a.yaml --set shuf", ["shuffle."]),
    ("run a.yaml --set embed.dtype=", [f"embed.dtype={kind}" for kind in ("bfloat16", "float16", "float32", "int8")]),
    ("run a.yaml --set train.profile=t", ["train.profile=true"]),
])  # fmt: skip
def test_tab(folder: Path, words: str, expected: list[str]) -> None:
    found, modules = offered(folder, words)
    assert found == expected
    assert not modules & {"torch", "numpy", "wandb", "pyarrow", "obstore", "optuna"}, "which take seconds to import"


def test_every_field_is_reached_a_section_at_a_time() -> None:
    from plmsae_cli.cli.completion import fields

    reached, sections = set[str](), [""]
    while sections:
        words = fields(sections.pop())
        sections += [word for word in words if word.endswith(".")]
        reached |= {word for word in words if word.endswith("=")}
    assert reached == {f"{path}=" for path, entry in entries().items() if entry.section is None}


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_which_cuts_words_at_the_equals_sign_is_given_what_stands_behind_it(folder: Path, tmp_path: Path) -> None:
    """Words as bash 5 hands them over: `=` is one of its own, also where nothing stands behind it."""
    tool = tmp_path / "plmsae"
    tool.write_text(f"#!{sys.executable}\nfrom plmsae_cli.cli.app import main\nmain()\n")
    tool.chmod(0o755)
    script = """
        eval "$(plmsae --show-completion bash)"
        compopt() { printf ' without a space'; }
        ask() { COMP_WORDS=(plmsae "$@"); COMP_CWORD=$#; _plmsae_completion plmsae; printf '%s,' "${COMPREPLY[@]}"; echo; }
        ask run a.yaml --set embed.dtype = fl
        ask run a.yaml --set train.profile =
        ask run a.yaml --set shuf
        ask run a.yaml --set train.lr_dec
        ask run su
        ask comp
        ask run a.yaml --set train.profile=true ''
    """
    environment = {
        **os.environ,
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PYTHONPATH": str(Path(plmsae_cli.__file__).parents[1]),
    }
    done = subprocess.run(
        ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == [
        "float16,float32,",
        "true,false,",
        " without a spaceshuffle.,",
        " without a spacetrain.lr_decay=,",
        " without a spacesub/,",
        "compare,",
        "a.yaml,b.yml,runs/,sub/,",
    ]
    assert done.stderr == ""
