"""The house as drawn: arrows between rooms run one way, and nothing in the package runs strings or unpickles files."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import plmsae_cli

PACKAGE = Path(plmsae_cli.__file__).parent
REPOSITORY = PACKAGE.parent
FILES = sorted(PACKAGE.rglob("*.py"))
NAMES = [str(path.relative_to(PACKAGE)) for path in FILES]

UNPICKLERS = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib", "yaml"}
EXTRAS = {
    "ray", "submitit", "litdata", "transformers", "biotite", "tmtools", "optuna", "huggingface_hub", "Bio",
    "pytest", "hypothesis",
}  # fmt: skip
# Optional packages, each imported in the one file that is about it.
OWN_EXTRAS = {
    "executors/ray.py": {"ray"},
    "executors/search.py": {"optuna"},
    "executors/study.py": {"optuna"},
    "executors/slurm.py": {"submitit"},
    "training/litdata_stream.py": {"litdata"},
    "evaluation/annotations/uniprot_flat.py": {"Bio"},
    "evaluation/contacts/structure.py": {"biotite"},
    "evaluation/structure/esmfold.py": {"transformers"},
    "evaluation/structure/metrics.py": {"tmtools"},
    "runtime/hub/export.py": {"huggingface_hub"},
    "runtime/hub/modeling_plmsae_unet.py": {"transformers"},  # copied, and imported by transformers alone
}
RUNNERS = {"run", "Popen", "call", "check_call", "check_output"}
FORBIDDEN = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "tempfile.mktemp"}
FOREIGN_WEIGHTS = "store/pickles.py"


def nodes(name: str) -> Iterator[ast.AST]:
    return ast.walk(ast.parse((PACKAGE / name).read_text(encoding="utf-8")))


def imported(name: str) -> set[str]:
    """Top names of everything a file imports, wherever in the file."""
    found = set()
    for node in nodes(name):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(str(node.module).split(".")[0])
    return found


def calls(name: str) -> Iterator[tuple[str, ast.Call]]:
    """Every call, by the dotted name as written."""
    for node in nodes(name):
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)):
            yield ast.unparse(node.func), node


def test_import_contracts_hold() -> None:
    pytest.importorskip("importlinter")
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    environment = {**os.environ, "NO_COLOR": "1"}
    linted = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False, env=environment
    )
    assert linted.returncode == 0, linted.stdout + linted.stderr
    assert "0 broken" in linted.stdout


def test_every_room_has_its_place_in_the_contracts() -> None:
    contracts = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    layers, independent = contracts["contracts"][0]["layers"], contracts["contracts"][1]["modules"]
    placed = {room.strip() for layer in [*layers, *independent] for room in layer.split("|")}
    rooms = {f"plmsae_cli.{folder.name}" for folder in PACKAGE.iterdir() if (folder / "__init__.py").exists()}
    assert rooms == placed


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith(("plm/", "sae/"))])
def test_the_leaves_know_torch_and_numpy_alone(name: str) -> None:
    assert imported(name) - set(sys.stdlib_module_names) <= {"torch", "numpy", "triton", "plmsae_cli"}


def test_settings_are_read_without_torch_or_numpy() -> None:
    code = (
        "import sys; import plmsae_cli.config.yaml, plmsae_cli.config.bugfix, plmsae_cli.config.schema;"
        "sys.exit(' '.join({'torch', 'numpy'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_planning_needs_no_compiler() -> None:
    """It takes seconds, and more memory than five million proteins."""
    code = (
        "import sys; import plmsae_cli.stages.embed, plmsae_cli.stages.optimize, plmsae_cli.stages.train;"
        "sys.exit(' '.join({'torch._dynamo', 'torch._inductor', 'triton', 'sympy'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


@pytest.mark.parametrize("name", NAMES)
def test_no_file_runs_strings_unpickles_or_needs_an_extra(name: str) -> None:
    assert not imported(name) & UNPICKLERS
    assert not imported(name) & (EXTRAS - OWN_EXTRAS.get(name, set()))
    for called, call in calls(name):
        last = called.rpartition(".")[2]
        options = {keyword.arg: keyword.value for keyword in call.keywords}
        assert called not in FORBIDDEN, called
        assert not called.startswith(("os.exec", "os.spawn", "subprocess.get")), called
        assert "shell" not in options, called
        assert "allow_pickle" not in options or ast.literal_eval(options["allow_pickle"]) is False, called
        if last == "load" and called.startswith("torch"):
            assert name == FOREIGN_WEIGHTS, called
            assert ast.literal_eval(options["weights_only"]) is True
        if last in ("extractall", "extract"):
            assert ast.literal_eval(options["filter"]) == "data"
        if called.startswith("subprocess.") and last in RUNNERS:
            assert _is_list(call.args[0], name), f"{name}:{call.lineno}"


def _is_list(node: ast.expr, name: str) -> bool:
    """A list as written, or a name that stands for one in this file."""
    if isinstance(node, ast.Name):
        values = [a.value for a in nodes(name) if isinstance(a, ast.Assign) and ast.unparse(a.targets[0]) == node.id]
        return bool(values) and all(isinstance(value, ast.List) for value in values)
    return isinstance(node, ast.List)
