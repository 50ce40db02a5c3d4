"""Ray's executor on a cluster of three nodes: the same bytes though a node is lost in each half, errors told once."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors import ray_room
from plmsae_cli.executors.local import LocalExecutor
from plmsae_cli.executors.pipeline import plan_stage, run_experiment
from plmsae_cli.executors.ray import RayExecutor
from plmsae_cli.runtime.progress import PlainReporter
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.task import Interrupted, TaskFailed
from plmsae_cli.store.fs import Store

ray = pytest.importorskip("ray")
Prepared = Callable[..., Experiment]
SMALL = {"num_cpus": 1, "object_store_memory": 100 << 20, "memory": 1 << 30}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without cores and one node with one; drivers of this process join it."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("RAY_DISABLE_IMPORT_WARNING", "1")
        found = Cluster(initialize_head=True, head_node_args={**SMALL, "num_cpus": 0, "include_dashboard": False})
        found.add_node(**SMALL)
        ray.init(address=found.address, log_to_driver=False, logging_level=logging.ERROR)
        yield found
        ray.shutdown()
        found.shutdown()


def stopped_processes(mark: str) -> list[int]:
    """Stopped processes that were given this mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state == "T" and mark.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


def all_cores(cluster: Any) -> Any:
    """The cores there are, taken: a placement group."""
    cluster.wait_for_nodes(240)  # one that was killed counts as alive until its signs of life have been missed
    group = ray.util.placement_group([{"CPU": 1}] * int(ray.cluster_resources()["CPU"]))
    assert group.wait(240)
    while ray.available_resources().get("CPU", 0):  # nodes tell the cluster of it a moment later
        time.sleep(0.05)
    return group


def lose_a_node(cluster: Any, points: list[str]) -> threading.Thread:
    """Add a node whose workers stop dead in the task they get; when one has, take the node away.

    The others are kept busy until then: theirs are warm, and might do all before one has started here.
    """
    busy = all_cores(cluster)
    mark = ";".join(f"stop:{point}.begin" for point in points)
    node = cluster.add_node(**SMALL, env_vars={"PLMSAE_FAULT": mark})

    def watch() -> None:
        deadline = time.monotonic() + 240
        while not (hit := stopped_processes(mark)) and time.monotonic() < deadline:
            time.sleep(0.1)
        cluster.remove_node(node, allow_graceful=False)
        ray.util.remove_placement_group(busy)
        lost.extend(hit)
        for process in hit:
            os.kill(process, signal.SIGKILL)

    lost: list[int] = []
    thread = threading.Thread(target=watch)
    thread.lost = lost  # type: ignore[attr-defined]
    thread.start()
    return thread


def test_nodes_write_what_one_process_writes(
    cluster: Any,
    prepared: Prepared,
    run_stages: Callable[..., None],
    files: Callable[..., Any],
    reference: dict[str, Any],
) -> None:
    experiment = prepared("ray", executor="ray")
    executor = RayExecutor(experiment)
    assert executor.slots == 1
    run_stages(experiment, executor)
    executor.close()
    assert ray.is_initialized(), "a cluster that was joined before is left alone"
    assert files(experiment) == reference


@pytest.mark.slow
def test_a_node_lost_during_map_and_one_during_reduce(
    cluster: Any,
    prepared: Prepared,
    run_stages: Callable[..., None],
    files: Callable[..., Any],
    reference: dict[str, Any],
) -> None:
    experiment = prepared("ray-lost", executor="ray")
    run_stages(experiment, LocalExecutor(prepared("ray-lost")), ("embed",))
    for stage in ("shuffle", "optimize"):
        plan = plan_stage(stage, experiment, Store())
        thread = lose_a_node(cluster, [f"{stage}.{task.id}" for task in plan.tasks])
        executor = RayExecutor(experiment)
        assert executor.slots >= 2
        executor.run(plan, lambda *_, **__: None)
        thread.join()
        assert thread.lost, "no task was at work on the node that was lost"  # type: ignore[attr-defined]
    assert files(experiment) == reference


def test_a_task_that_always_fails_is_told_once(
    cluster: Any, prepared: Prepared, tmp_path: Path, run_stages: Callable[..., None]
) -> None:
    experiment = prepared("ray-failing", executor="ray")
    broken = experiment.model_copy(update={"embed": experiment.embed.model_copy(update={"fasta": str(tmp_path / "f")})})  # type: ignore[union-attr]
    (tmp_path / "f").write_text(">a\nMKV\n>b\nMKVL\n>c\nMKVLL\n")
    plan = plan_stage("embed", broken, Store())
    (tmp_path / "f").unlink()
    with pytest.raises(UserError, match=str(tmp_path / "f")):
        RayExecutor(broken).run(plan, lambda *_, **__: None)


@pytest.mark.slow
def test_a_worker_that_always_dies_is_told_once(cluster: Any, prepared: Prepared) -> None:
    experiment = prepared("ray-dying", executor="ray", ray={"retries": 0})
    plan = plan_stage("embed", experiment, Store())
    executor = RayExecutor(experiment)
    die = ray.remote(max_calls=0)(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    executor._work = die
    with pytest.raises(TaskFailed, match=r"proteins: its worker was lost 1 time\(s\)"):
        executor.run(plan, lambda *_, **__: None)


def test_a_task_that_no_node_can_hold_is_refused(cluster: Any, prepared: Prepared) -> None:
    experiment = prepared("ray-large", executor="ray", ray={"cpus": 64})
    with pytest.raises(
        UserError, match=r"no node .* can hold task \S+ of embed: it asks for CPU 64 \(most on one node 1\)"
    ):
        RayExecutor(experiment).run(plan_stage("embed", experiment, Store()), lambda *_, **__: None)


def test_a_wish_to_stop_ends_it(cluster: Any, prepared: Prepared) -> None:
    experiment = prepared("ray-stopped", executor="ray")
    STOP.asked = True
    with pytest.raises(Interrupted):
        RayExecutor(experiment).run(plan_stage("embed", experiment, Store()), lambda *_, **__: None)


def test_no_cluster_at_the_address(prepared: Prepared, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**options: Any) -> None:
        assert options["address"] == "auto"
        raise ConnectionError("Could not find any running Ray instance.\nmore words")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(UserError, match=r"launch\.ray\.address: auto cannot be used: Could not find any") as error:
        RayExecutor(prepared("alone", executor="ray"))
    assert "ray start --head" in str(error.value.hint)


@pytest.fixture
def taken(cluster: Any) -> Iterator[Any]:
    group = all_cores(cluster)
    yield group
    ray.util.remove_placement_group(group)


def test_a_gang_says_what_it_waits_for_and_begins_when_it_is_there(
    cluster: Any, taken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seconds in {"SAY_AFTER_S": 0.0, "SAY_CHANGES_EVERY_S": 0.0, "SAY_EVERY_S": 2.0}.items():
        monkeypatch.setattr(ray_room, name, seconds)
    cores, nodes = len(taken.bundle_specs), sum(node["Alive"] for node in ray.nodes())
    said: list[str | None] = []

    def say(what: str | None) -> None:
        said.append(what)
        if len(said) == 2:
            ray.util.remove_placement_group(taken)

    group = ray.util.placement_group([{"CPU": 1}] * cores)
    try:
        ray_room.wait_for_room(ray, group, {"CPU": 1}, cores, say, may_join=False)
        assert ray.util.placement_group_table(group)["state"] == "CREATED"
    finally:
        ray.util.remove_placement_group(group)
    line = f"waiting for room in the Ray cluster: {cores} rank{'s' * (cores > 1)} with 1 CPU each; {nodes} nodes with "
    assert said[:2] == [f"{line}{cores} CPU ({cores} taken)"] * 2, "the same again after a while"
    assert said[-1] is None


def test_a_gang_that_can_never_have_its_place_is_refused(cluster: Any) -> None:
    """Not before the cluster has said that nothing adds nodes, which takes seconds after its start."""
    cores = int(ray.cluster_resources()["CPU"])
    group = ray.util.placement_group([{"CPU": 1}] * 64)
    words = (
        rf"can never hold the 64 ranks of train: each asks for CPU 1 \(most on one node 1\).* room for {cores} of 64"
    )
    try:
        with pytest.raises(UserError, match=words):
            ray_room.wait_for_room(ray, group, {"CPU": 1}, 64, lambda _: None, may_join=False)
    finally:
        ray.util.remove_placement_group(group)


@pytest.mark.slow
def test_the_run_of_a_gang_that_waits_says_so_and_can_be_stopped(
    cluster: Any, taken: Any, trained: Callable[..., Experiment], tmp_path: Path
) -> None:
    launch = {"executor": "ray", "ranks": len(taken.bundle_specs), "ray": {"address": cluster.address}}
    experiment = trained("ray-waiting", "ray-train", **launch)
    (tmp_path / "exp.yaml").write_text(json.dumps(experiment.dump()))
    command = [sys.executable, "-c", "from plmsae_cli.cli.app import main; main()"]
    folder = Path(experiment.root) / "ray-waiting"
    training = subprocess.Popen(
        [*command, "train", str(tmp_path / "exp.yaml")], stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    )
    try:
        assert training.stderr is not None
        said = next(line for line in training.stderr if line.startswith("waiting for room"))
        deadline = time.monotonic() + 240
        while "waiting" not in (status := json.loads((folder / "status.json").read_text())):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert (status["state"], status["stage"], status["waiting"] + "\n") == ("running", "train", said)
        shown = subprocess.run([*command, "status", str(folder)], capture_output=True, text=True, check=True).stdout
        assert shown.startswith(f"{folder}: running (waiting), in train\n  {said}")
        training.send_signal(signal.SIGTERM)
        training.communicate(timeout=240)
        assert training.returncode == 75
    finally:
        training.kill()
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], "waiting" in status) == ("interrupted", False)


@pytest.mark.slow
def test_a_gang_that_lost_a_node_waits_for_another_and_begins_again(
    cluster: Any, one_thread: None, trained: Callable[..., Experiment], losses: Callable[[Experiment], list[float]]
) -> None:
    cluster.wait_for_nodes(240)
    assert ray.cluster_resources()["CPU"] == 1, "tests that add nodes for good come behind"
    lost = [cluster.add_node(**SMALL)]
    alone = trained("ray-alone-long", "ray-train", "128_000")
    LocalExecutor(alone).run(plan_stage("train", alone, Store()), lambda *_, **__: None)
    gang = trained("ray-lost-rank", "ray-train", "128_000", executor="ray", ranks=2)
    notes: list[str] = []

    def report(done: float | None, total: float | None, note: str | None = None, **_: Any) -> None:
        notes.extend([] if note is None else [note])
        if lost and done:
            cluster.remove_node(lost.pop(), allow_graceful=False)
        if note is not None and note.endswith("a node has to join first"):
            cluster.add_node(**SMALL)

    RayExecutor(gang).run(plan_stage("train", gang, Store()), report)
    assert [note for note in notes if "trying again from the newest checkpoint" in note], notes
    assert [note for note in notes if note.endswith("a node has to join first")], notes
    assert losses(gang) == pytest.approx(losses(alone), rel=1e-3)


@pytest.mark.slow
def test_ranks_train_in_a_placement_group_and_trials_side_by_side(
    cluster: Any, one_thread: None, trained: Callable[..., Experiment], losses: Callable[[Experiment], list[float]]
) -> None:
    """A gang of two, and two trials, on two nodes with a core each; losses are those of lone runs."""
    cluster.wait_for_nodes(240)
    if ray.cluster_resources()["CPU"] < 2:
        cluster.add_node(**SMALL)
    alone = trained("ray-alone", "ray-train")
    LocalExecutor(alone).run(plan_stage("train", alone, Store()), lambda *_, **__: None)
    gang = trained("ray-gang", "ray-train", executor="ray", ranks=2)
    RayExecutor(gang).run(plan_stage("train", gang, Store()), lambda *_, **__: None)
    assert losses(gang) == pytest.approx(losses(alone), rel=1e-4)

    body = trained("ray-sweep", "ray-train", executor="ray").dump()
    body["train"]["sae"] = {"k": 4, "expansion": 2}
    swept = Experiment.model_validate({**body, "sweep": {"grid": {"train.sae.k": [4, 9999]}}})
    with pytest.raises(UserError, match="1 of 2 trials failed"):
        run_experiment(swept, ["sweep"], PlainReporter())
    table = json.loads((Path(swept.root) / "ray-sweep" / "sweep.json").read_text())["trials"]
    assert [trial["state"] for trial in table] == ["done", "failed"]
    first = Path(swept.root) / "ray-sweep" / "trials" / table[0]["hash"]
    assert json.loads((first / "metrics.jsonl").read_text().splitlines()[-1])["loss"] == losses(alone)[-1]
