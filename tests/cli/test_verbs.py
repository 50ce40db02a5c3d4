"""Each verb: what it prints, what it writes, what it leaves alone."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from plmsae_cli import load_sae
from plmsae_cli.cli.status import best_line, foretold_lines
from plmsae_cli.config.schema import FILE, text
from plmsae_cli.runtime.foretold import foretell
from plmsae_cli.runtime.processes import SILENT_S, live_state, me, state_words
from plmsae_cli.runtime.results import best_trial
from plmsae_cli.runtime.run_folder import RunFolder, beating, write_json

Plmsae = Callable[..., Any]
Write = Callable[..., Path]
STAGES = ["embed", "shuffle", "optimize", "train", "eval"]
GRID = "sweep: {grid: {train.sae.k: [2, 4]}}\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Filled by the first test that needs a finished run; later ones only look."""
    return {"folder": tmp_path_factory.mktemp("finished")}


@pytest.fixture
def run(finished: dict[str, Any], plmsae: Plmsae, write: Write) -> dict[str, Any]:
    """One experiment through every stage: its YAML, its run folder, what `--json` said."""
    if "outcome" not in finished:
        finished["root"] = finished["folder"] / "runs"
        finished["yaml"] = finished["folder"] / "one.yaml"
        written = write(root=finished["root"], data=finished["root"] / "data")
        finished["yaml"].write_text(written.read_text())
        finished["outcome"] = plmsae("run", finished["yaml"], "--json")
        assert finished["outcome"].code == 0, finished["outcome"].err
    return finished


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below a folder: size and time of its last change."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in folder.rglob("*")}


@pytest.mark.parametrize("stage", [*STAGES, "run"])
def test_a_dry_run_before_anything_exists_touches_nothing(
    plmsae: Plmsae, write: Write, tmp_path: Path, stage: str
) -> None:
    path = write(data=tmp_path / "data")
    before = tree(tmp_path)
    shown = plmsae(stage, path, "--dry-run")
    assert shown.code == 0, shown.err
    assert tree(tmp_path) == before
    assert f"train.sae.k: 4{' ' * 3}" in shown.out
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if "k: 4" in text)
    assert f"one.yaml:{line}\n" in shown.out
    assert "# default" in shown.out
    for planned in STAGES if stage == "run" else [stage]:
        assert f"{planned}: " in shown.out
    assert "nothing was touched" in shown.err


def test_a_dry_run_of_a_sweep_plans_its_trials(plmsae: Plmsae, write: Write, tmp_path: Path) -> None:
    path = write(more=GRID, data=tmp_path / "data")
    before = tree(tmp_path)
    for arguments in (["sweep"], ["run"], ["eval"]):
        assert plmsae(*arguments, path, "--dry-run").code == 0
    body = json.loads(plmsae("sweep", path, "--dry-run", "--json").out)
    assert [plan["stage"] for plan in body["plans"]] == ["train", "train"]
    assert len({plan["artifacts"]["run"]["folder"] for plan in body["plans"]}) == 2
    assert tree(tmp_path) == before


def test_json_of_a_dry_run(plmsae: Plmsae, write: Write, tmp_path: Path) -> None:
    path = write(data=tmp_path / "data")
    stage = json.loads(plmsae("embed", path, "--dry-run", "--json").out)
    assert stage["schema"] == 1
    assert stage["experiment"]["train"]["sae"]["k"] == 4
    (plan,) = stage["plans"]
    assert (plan["stage"], plan["done"]) == ("embed", False)
    (made,) = plan["artifacts"].values()
    assert made["folder"] == str(tmp_path / "data" / f"embed-{made['key']}")
    assert made["bytes"] == (plan["figures"]["rows"] + plan["figures"]["heldout_rows"]) * 32 * 4
    whole = json.loads(plmsae("run", path, "--dry-run", "--json").out)
    assert whole["schema"] == 1
    assert [p["stage"] for p in whole["experiments"][0]["plans"]] == STAGES
    # A stage plans from what is planned upstream: the same folders, whether or not they exist.
    assert whole["experiments"][0]["plans"][0] == plan


def test_json_of_a_run_and_of_its_second_start(plmsae: Plmsae, run: dict[str, Any]) -> None:
    body = json.loads(run["outcome"].out)
    assert body["schema"] == 1
    assert [(e["state"], Path(e["path"]).name) for e in body["queue"]] == [("done", "one.yaml")]
    (experiment,) = body["experiments"]
    assert set(experiment["seconds"]) == set(STAGES)
    assert Path(experiment["report"]).is_file()
    assert 0 < experiment["figures"]["fvu"] < 2
    assert set(experiment["artifacts"]) == {"embed", "shuffle", "optimize"}
    for pointer in experiment["artifacts"].values():
        assert (Path(pointer["folder"]) / "MANIFEST.json").is_file()
    again = json.loads(plmsae("run", run["yaml"], "--json").out)
    assert again["queue"][0]["state"] == "skipped"
    assert again["experiments"][0]["figures"] == experiment["figures"]
    stage = json.loads(plmsae("eval", run["yaml"], "--json").out)
    assert (stage["schema"], stage["state"], stage["seconds"]) == (1, "done", {})


def test_a_run_is_listed_by_its_name_from_within_too(
    plmsae: Plmsae, run: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(run["root"] / "one")
    assert [found["name"] for found in json.loads(plmsae("ls", ".", "--json").out)["runs"]] == ["one"]


def test_export_for_saelens(plmsae: Plmsae, run: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "lens"
    body = json.loads(plmsae("export", run["root"] / "one", "--saelens", folder, "--json").out)
    assert body["saelens_files"] == sorted(path.name for path in folder.iterdir())
    ours, back = load_sae(run["root"] / "one"), load_sae(folder)
    x = torch.randn(20, ours.d, generator=torch.Generator().manual_seed(0))
    assert torch.equal(back.encode_dense(x), ours.encode_dense(x))
    again = plmsae("export", run["root"] / "one", "--saelens", folder)
    assert (again.code, "not an empty folder" in again.err) == (2, True)
    lone = plmsae("export", run["root"] / "one", "--push", "owner/name")
    assert lone.code == 2


def test_ls_and_status(plmsae: Plmsae, run: dict[str, Any]) -> None:
    body = json.loads(plmsae("ls", run["root"], "--json").out)
    assert body["schema"] == 1
    (one,) = body["runs"]
    assert (one["name"], one["state"]) == ("one", "done")
    assert {data["stage"] for data in body["data"]} == {"embed", "shuffle", "optimize"}
    assert all(data["used_by"] == ["one"] for data in body["data"])
    rows = {data["stage"]: data["rows"] for data in body["data"]}
    assert len(set(rows.values())) == 1
    shown = plmsae("ls", run["root"]).out
    assert "loss recovered" in shown
    assert all(Path(data["folder"]).name in shown for data in body["data"])

    status = json.loads(plmsae("status", run["root"] / "one", "--json").out)
    assert (status["schema"], status["state"], status["last"]["step"]) == (1, "done", 10)
    words = plmsae("status", run["root"] / "one").out
    assert words.splitlines()[0].endswith("one: done")
    assert "FVU" in words


def test_ls_shows_what_training_reached_where_nothing_was_evaluated(plmsae: Plmsae, tmp_path: Path) -> None:
    """Also while the last line is being written, and of a language model."""
    for name, line in (("sae", {"step": 3, "fvu": 0.25, "l0": 4.0, "dead": 0.5, "loss": 9.0}), ("lm", {"loss": 2.5})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "status.json").write_text('{"state": "failed"}')
        (tmp_path / name / "metrics.jsonl").write_text('{"fvu": 7}\n' * 9000 + json.dumps(line) + '\n{"step": 4, "fv')
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "status.json").write_text('{"state": "failed"}')
    shown = [line.split() for line in plmsae("ls", tmp_path).out.splitlines()]
    assert shown[1] == ["lm", "failed", "-", "-", "-", "-", "(2.5)"]
    assert shown[2] == ["new", "failed", *"-----"]
    assert shown[3] == ["sae", "failed", "(0.25)", "(4)", "(0.5)", "-", "-"]
    assert shown[4][:2] == ["in", "brackets:"]
    assert "last: step 3, fvu 0.25" in plmsae("status", tmp_path / "sae").out


def test_ls_and_status_of_what_is_not_there(plmsae: Plmsae, tmp_path: Path) -> None:
    for verb in ("ls", "status"):
        missed = plmsae(verb, tmp_path / "nowhere")
        assert missed.code == 2
        assert "nowhere" in missed.err
        assert "hint: " in missed.err
    assert "no runs" in plmsae("ls", tmp_path).out


def test_a_running_state_whose_process_is_gone_was_killed() -> None:
    import subprocess
    import sys

    child = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    assert live_state({"state": "running", "pid": int(child.stdout)}) == "killed"
    assert live_state({"state": "running", "pid": 1}) == "running"
    assert live_state({"state": "done", "pid": int(child.stdout)}) == "done"
    assert live_state({"state": "running", **me()}) == "running"
    assert live_state({"state": "running", **me(), "started": "another boot:1"}) == "killed", (
        "its number is another's now"
    )
    far = {"state": "running", **me(), "pid": 0, "host": "elsewhere"}
    assert live_state(far) == "running"
    assert live_state({**far, "updated": time.time() - SILENT_S / 2}) == "running"
    silent = {**far, "updated": time.time() - 2 * SILENT_S}
    assert live_state(silent) == "silent"
    assert state_words(silent).startswith("no word since 20")
    assert state_words(silent).endswith(" from elsewhere")
    assert live_state({**silent, "state": "done"}) == "done"


def test_a_run_gives_signs_of_life_while_it_is_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plmsae_cli.runtime.run_folder.BEAT_S", 0.01)
    run = RunFolder(tmp_path / "a")

    def updated() -> float:
        return float(json.loads((run.path / "status.json").read_text())["updated"])

    with beating([run]):
        run.status(state="running")
        before = updated()
        end = time.monotonic() + 60
        while updated() == before:
            assert time.monotonic() < end
            time.sleep(0.01)
        run.status(state="done")
        before = updated()
        time.sleep(0.1)
    assert updated() == before


def test_the_best_trial_of_a_sweep(plmsae: Plmsae, tmp_path: Path) -> None:
    def row(name: str, k: int, state: str = "done", **more: object) -> dict[str, object]:
        return {"hash": name, "values": {"train.sae.k": k}, "state": state, "metrics": {}, **more}

    run = tmp_path / "s"
    RunFolder(run).status(state="running")
    assert best_trial(run) is None
    rows = [row("a", 1, metrics={"fvu": 0.3}), row("b", 2, metrics={"fvu": 0.2}), row("c", 3, "failed")]
    write_json(run / "sweep.json", {"trials": rows})
    assert best_trial(run) == ("b", {"train.sae.k": 2}, "fvu", 0.2)
    assert "best by fvu: 0.2, k=2 (trials/b)" in plmsae("status", run).out
    assert json.loads(plmsae("status", run, "--json").out)["best"]["hash"] == "b"
    assert best_line(run) == ["best by fvu: 0.2, k=2 (trials/b)"]
    searched = [row("a", 1, objective=0.9), row("b", 2, objective=0.8), row("c", 3, "pruned", objective=None)]
    search = {"metric": "recovered_zero", "direction": "maximize"}
    write_json(run / "sweep.json", {"trials": searched, "search": search})
    assert best_trial(run) == ("a", {"train.sae.k": 1}, "recovered_zero", 0.9)
    (run / "trials" / "a").mkdir(parents=True)
    (run / "trials" / "a" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.5}\n')
    write_json(run / "sweep.json", {"trials": [row("a", 1), row("b", 2, "pending")]})
    assert best_trial(run) == ("a", {"train.sae.k": 1}, "loss", 2.5)


def test_dollars_stand_beside_runs_where_a_price_is_set(plmsae: Plmsae, tmp_path: Path) -> None:
    for name, price in (("priced", 3.0), ("free", None)):
        run = RunFolder(tmp_path / name)
        run.status(state="done", stage_seconds={"embed": 3600.0, "eval": 1200.0})
        foretell(run.path, "embed", {"hours": 0.5}, 2, price)
        foretell(run.path, "eval", {}, 1, price)
    lines = [line.split() for line in plmsae("ls", tmp_path).out.splitlines()]
    assert [line[-1] for line in lines] == ["cost", "-", "$7.00"]
    assert json.loads(plmsae("ls", tmp_path, "--json").out)["runs"][1]["usd"] == 7.0
    embed, cost = foretold_lines(tmp_path / "priced")
    assert re.fullmatch(r"embed: predicted .*, \$3\.00; came to .*, \$6\.00", embed)
    assert cost == "cost: $7.00"


def test_missing_inputs_are_listed_with_the_ways_on(plmsae: Plmsae, write: Write, tmp_path: Path) -> None:
    path = write(data=tmp_path / "data")
    for stage, upstream in (("shuffle", "embed"), ("optimize", "shuffle"), ("train", "optimize"), ("eval", "train")):
        refused = plmsae(stage, path)
        assert refused.code == 2
        assert f"({upstream})" in refused.err
        assert f"plmsae run {path}" in refused.err
        assert "--with-inputs" in refused.err
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "data").exists()
    plan = json.loads(plmsae("embed", path, "--dry-run", "--json").out)["plans"][0]
    folder = plan["artifacts"]["layer-2"]["folder"]
    assert folder in plmsae("shuffle", path).err
    assert plmsae("shuffle", path, "--with-inputs").code == 0
    assert (Path(folder) / "MANIFEST.json").is_file()
    assert plmsae("shuffle", path).code == 0
    assert sorted(p.name.split("-")[0] for p in (tmp_path / "data").iterdir()) == ["embed", "shuffle"]


def test_missing_trials_are_listed_before_a_sweep_is_evaluated(plmsae: Plmsae, write: Write, tmp_path: Path) -> None:
    refused = plmsae("eval", write(more=GRID))
    assert refused.code == 2
    assert refused.err.count("(sweep)") == 2


def test_a_sweep_trains_and_scores_every_trial_and_eval_finds_nothing_left(plmsae: Plmsae, write: Write) -> None:
    path = write("grid.yaml", more=GRID)
    body = json.loads(plmsae("run", path, "--json").out)
    assert body["queue"][0]["state"] == "done"
    folder = Path(body["experiments"][0]["run"])
    table = json.loads((folder / "sweep.json").read_text())
    assert [trial["state"] for trial in table["trials"]] == ["done", "done"]
    for trial in table["trials"]:
        assert trial["metrics"]["l0_mean"] == pytest.approx(trial["values"]["train.sae.k"], abs=0.5)
    assert (folder / "report" / "index.html").is_file()
    evaluated = plmsae("eval", path, "--json")
    assert (evaluated.code, json.loads(evaluated.out)["seconds"]) == (0, {})
    assert plmsae("train", path).code == 2
    assert plmsae("verify", path).out.count(": sound") == 6  # three artifacts, the sweep, two trials
    for verb in (
        ["export", folder, "--csv", folder / "a.csv"],
        ["export", folder, "--saelens", folder / "a"],
        ["browse", folder],
    ):
        refused = plmsae(*verb)
        assert (refused.code, "is a sweep: its trials are runs" in refused.err) == (2, True)
    weights = folder / "trials" / table["trials"][1]["hash"] / "sae" / "sae.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
    damaged = plmsae("verify", path)
    assert (damaged.code, f"{weights}: content differs" in damaged.out) == (1, True)
    weights.write_bytes(before)
    for trial in table["trials"]:
        shutil.rmtree(folder / "trials" / trial["hash"] / "eval")
    evaluated = plmsae("eval", path, "--json")
    assert set(json.loads(evaluated.out)["seconds"]) == {"eval"}
    assert json.loads((folder / "sweep.json").read_text()) == table


def test_set_changes_a_field_for_one_start_and_shows_where_it_came_from(plmsae: Plmsae, write: Write) -> None:
    path = write()
    shown = plmsae("train", path, "--dry-run", "--set", "train.sae.k=7", "--set", "train.lr=1e-4")
    lines = {line.split(":")[0]: line for line in shown.out.splitlines()}
    assert lines["train.sae.k"].split() == ["train.sae.k:", "7", "#", "--set"]
    assert lines["train.lr"].split() == ["train.lr:", "0.0001", "#", "--set"]
    assert plmsae("train", path, "--dry-run", "--set", "train.sae.kk=7").code == 2


def test_another_science_is_refused_before_the_old_run_is_touched_and_restart_archives(
    plmsae: Plmsae, write: Write, tmp_path: Path
) -> None:
    path = write()
    assert plmsae("run", path).code == 0
    run = tmp_path / "runs" / "one"
    before = tree(run)
    refused = plmsae("run", path, "--set", "train.sae.k=5")
    assert refused.code == 2
    assert "train.sae.k: 4 -> 5" in refused.err
    assert "--restart" in refused.err
    assert plmsae("embed", path, "--set", "train.sae.k=5").code == 2
    assert tree(run) == before
    kept = {p.relative_to(run): p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert plmsae("train", path, "--set", "train.sae.k=5", "--restart").code == 0
    (archived,) = run.parent.glob("one.archived-*")
    assert {p.relative_to(archived): p.read_bytes() for p in archived.rglob("*") if p.is_file()} == kept
    assert json.loads((run / "identity.json").read_text())["train"]["sae"]["k"] == 5


@pytest.mark.parametrize("kind", ["sae", "plm", "sweep"])
def test_init_writes_an_experiment_that_is_valid_with_the_users_proteins(
    plmsae: Plmsae, shared: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "my own.yaml"
    made = plmsae("init", path, "--kind", kind)
    assert made.code == 0
    assert f"`plmsae run '{path}'`" in made.err, "to be pasted into a shell"
    written = path.read_text()
    again = plmsae("init", path, "--kind", kind)
    assert again.code == 2
    assert "never overwrites" in again.err
    assert path.read_text() == written
    changes = ["model.weights=bundled", f"embed.fasta={shared['fasta']}", "embed.layers=[3]", "optimize.block_rows=64"]
    changes = [f"train.plm.fasta={shared['fasta']}"] if kind == "plm" else [*changes, "train.batch_tokens=256"]
    valid = plmsae("validate", path, *(part for change in changes for part in ("--set", change)))
    assert valid.code == 0, valid.err
    assert "valid; " in valid.out


def test_init_full_and_an_unknown_kind(plmsae: Plmsae, tmp_path: Path) -> None:
    assert plmsae("init", tmp_path / "full.yaml", "--full").code == 0
    refused = plmsae("init", tmp_path / "x.yaml", "--kind", "nope")
    assert refused.code == 2
    assert "one of: sae, plm, sweep" in refused.err
    assert plmsae("init", tmp_path / "no" / "x.yaml").code == 2
    assert [p.name for p in tmp_path.iterdir()] == ["full.yaml"]


def test_validate_looks_at_inputs_too_and_reports_every_file(plmsae: Plmsae, write: Write, tmp_path: Path) -> None:
    good, bad = write("good.yaml"), write("bad.yaml", fasta=tmp_path / "nowhere.fasta")
    before = tree(tmp_path)
    checked = plmsae("validate", good, bad, "--json")
    assert checked.code == 2
    body = json.loads(checked.out)
    assert body["schema"] == 1
    assert [e["valid"] for e in body["experiments"]] == [True, False]
    assert body["experiments"][0]["tasks"] > 0
    assert f"error: {bad}: " in checked.err, "several files can have the same mistake"
    assert "nowhere.fasta" in checked.err
    assert tree(tmp_path) == before


def test_validate_compares_the_data_with_the_free_disk(
    plmsae: Plmsae, write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free = 1000

    monkeypatch.setattr("shutil.disk_usage", lambda path: Usage)
    checked = plmsae("validate", write(data=tmp_path / "data"))
    assert checked.code == 2
    assert "1 kB free" in checked.err


def test_schema_prints_the_committed_file(plmsae: Plmsae) -> None:
    printed = plmsae("schema")
    assert printed.code == 0
    assert printed.out == text()
    committed = Path(__file__).parents[2] / FILE
    assert printed.out == committed.read_text(encoding="utf-8")
