"""Help pages to the letter, in no time, and without importing what they do not need.

`python tests/cli/test_help.py` writes the pinned pages anew.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

import plmsae_cli
from plmsae_cli.cli.app import app

PINNED = Path(__file__).parent / "pinned"
STAGES = ["embed", "shuffle", "optimize", "train", "sweep", "eval"]
PAGES = [
    "plmsae", *STAGES, "run", "fetch", "init", "validate", "schema", "ls", "status", "logs", "compare", "report", "export",
    "browse", "verify", "clean", "doctor",
]  # fmt: skip
HEAVY = {
    "torch", "numpy", "esm", "wandb", "litdata", "pydantic", "rich", "ruamel", "matplotlib", "pyarrow", "boto3",
    "obstore", "jinja2", "safetensors",
}  # fmt: skip
ASK_HELP = (
    "import sys; sys.argv = ['plmsae', '--help']\n"
    "from plmsae_cli.cli.app import main\n"
    "try: main()\n"
    "finally: print(' '.join(sorted({name.split('.')[0] for name in sys.modules})), file=sys.stderr)"
)


def page(name: str) -> str:
    arguments = ["--help"] if name == "plmsae" else [name, "--help"]
    result = CliRunner().invoke(app, arguments, prog_name="plmsae", env={"COLUMNS": "100", "NO_COLOR": "1"})
    assert result.exit_code == 0
    return result.stdout


@pytest.mark.parametrize("name", PAGES)
def test_every_page_is_as_pinned(name: str) -> None:
    shown = page(name)
    assert shown == (PINNED / f"{name}.txt").read_text(encoding="utf-8")
    assert "\x1b" not in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_no_verb_is_without_a_pinned_page() -> None:
    verbs = [command.callback.__name__ for command in app.registered_commands if command.callback]
    assert verbs == PAGES[1:]
    assert sorted(path.stem for path in PINNED.glob("*.txt")) == sorted(PAGES)


def test_stages_come_first_in_pipeline_order_then_run_then_tools_then_exit_codes() -> None:
    lines = page("plmsae").splitlines()
    places = [next(i for i, line in enumerate(lines) if line.startswith(f"  {verb} ")) for verb in PAGES[1:]]
    assert places == sorted(places)
    tail = lines[lines.index("Exit codes:") + 1 :]
    assert [line.split()[0] for line in tail] == ["0", "1", "2", "3", "4", "75", "130"]


def cpu_seconds(code: str) -> float:
    """What a Python that runs this takes of the processor: on a machine at work the clock tells of others."""
    taken = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        taken.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(taken)


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    shown = subprocess.run([sys.executable, "-c", ASK_HELP], capture_output=True, text=True, check=True)
    assert "Stages, in pipeline order" in shown.stdout
    assert not HEAVY & set(shown.stderr.split())
    assert cpu_seconds(ASK_HELP) < 2 * cpu_seconds("import typer, typer.rich_utils"), (
        "little more than what it is made of"
    )


def test_version() -> None:
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"plmsae {plmsae_cli.__version__}\n")


def test_no_verb_at_all_shows_the_help_and_is_wrong_usage() -> None:
    result = CliRunner().invoke(app, [], prog_name="plmsae", env={"COLUMNS": "100"})
    assert result.exit_code == 2
    assert "Stages, in pipeline order" in result.output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["trian", "a.yaml"], "Did you mean 'train'?"),
        (["train"], "Missing argument 'YAML'"),
        (["train", "a.yaml", "--dryrun"], "--dry-run"),
    ],
)
def test_a_slip_of_the_finger_is_answered_with_the_word_meant(arguments: list[str], said: str) -> None:
    result = CliRunner().invoke(app, arguments, prog_name="plmsae")
    assert result.exit_code == 2
    assert said in result.output


if __name__ == "__main__":
    os.environ["NO_COLOR"] = "1"
    PINNED.mkdir(exist_ok=True)
    for each in PAGES:
        (PINNED / f"{each}.txt").write_text(page(each), encoding="utf-8")
