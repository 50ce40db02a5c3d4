"""The work of training SAEs: one, or many on one reading of the dataset. One is a group of one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment, Train
from plmsae_cli.runtime.device import pick_device, training_dtype
from plmsae_cli.runtime.dist import Gang, gang
from plmsae_cli.runtime.run_folder import RunFolder
from plmsae_cli.runtime.task import Context, Result, Task
from plmsae_cli.stages.common import require_manifest
from plmsae_cli.store.activations import Statistics
from plmsae_cli.store.blocks import Blocks
from plmsae_cli.store.checked import CheckedReads
from plmsae_cli.store.fs import FileRecord, join
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.range_cache import CachingStore
from plmsae_cli.training.export import Finished, export_saes
from plmsae_cli.training.loop import Diverged, Training, fit
from plmsae_cli.training.mixing import BatchEntropy
from plmsae_cli.training.sae_objective import MEDIAN_ROWS, SAEObjective
from plmsae_cli.training.stream import BlockStream, Stream

if TYPE_CHECKING:
    import torch


def work(task: Task, context: Context) -> Mapping[str, Result]:
    """Train the SAE of the experiment, or those of `members` in the task's arguments, and export them.

    Members agree on the dataset, the batch and the order of the blocks. One that fails by itself is marked so in its
    status and has no result; the others go on.

    Raises:
        UserError: the only one failed, or what all share did.
    """
    members = _members(task, context)
    first = next(iter(members.values()))
    lineage = Lineage(first, context.store)
    dataset = lineage.dataset()
    manifest = require_manifest(context.store, dataset.folder)
    statistics = Statistics.read(context.store, join(dataset.folder, "stats.safetensors"))
    mean_D, scale = statistics.normalisation()
    shared = _train(first)
    # Groups that train at the same time share a line.
    progress = partial(context.progress, group=task.args["group"]) if "group" in task.args else context.progress
    objectives: dict[str, SAEObjective] = {}
    trainings: dict[str, Training] = {}
    failed: set[str] = set()
    files: list[list[FileRecord]] = []
    with gang() as ranks:
        device = pick_device(ranks.local_rank)
        reads = _reads(context, shared, dataset.folder, manifest, ranks)
        blocks = Blocks(reads, dataset.folder)

        def leave(folder: str, error: UserError, reached: int = 0) -> None:
            if len(members) == 1:
                raise error
            failed.add(folder)
            if ranks.first:
                RunFolder(folder).status(state="failed", error=str(error).splitlines()[0])
                left = len(members) - len(failed)
                others = f"the other {left} go on" if left > 1 else "the other goes on" if left else "none is left"
                note = f"{members[folder].name} failed: {error}; {others}"
                progress(reached, max([1, *(t.total_steps for t in trainings.values())]), note=note)

        def lost(training: Training, error: Diverged) -> None:
            leave(next(folder for folder, t in trainings.items() if t is training), error, training.reached)

        with (
            closing(reads),
            _stream(blocks, shared, manifest, ranks, device) as stream,
            _entropy(shared, manifest, stream) as entropy,
        ):
            sample_RD = blocks.read(0, min(MEDIAN_ROWS, blocks.num_rows))
            for folder, experiment in members.items():
                train = _train(experiment)
                steps = train.steps(stream.steps_per_epoch)
                compute = training_dtype(train.compute, device)
                try:
                    objective = SAEObjective(train, stream, mean_D, scale, steps, ranks, device, compute, entropy)
                    objective.start(sample_RD)
                    trainings[folder] = Training(objective, steps, experiment, RunFolder(folder), ranks)
                    objectives[folder] = objective
                except UserError as error:  # its kernels cannot be had, or none of its checkpoints can be read
                    leave(folder, error)
            if trainings:
                fit(list(trainings.values()), ranks, progress, lost)
                reads.finish()
            done = {folder: t.total_steps for folder, t in trainings.items() if folder not in failed}
            facts = {f: {"steps": steps, "tokens": steps * shared.batch_tokens} for f, steps in done.items()}
            for folder in done:
                objectives[folder].release()  # as large as the copy that folding makes
            if ranks.first and done:
                common = {name: manifest[name] for name in ("layer", "num_layers", "weights", "fasta")}
                common |= {"dataset": dataset.key, "dataset_rows": manifest["rows"], "gamma": statistics.gamma}
                finished = [
                    Finished(
                        objectives[f], {**common, **facts[f], "train": _train(members[f]).science()}, join(f, "sae")
                    )
                    for f in done
                ]
                files = export_saes(finished, blocks, mean_D, scale, context.store)
                reads.finish()  # the export has read what training has not
    return {f: Result(written, facts[f]) for f, written in zip(done, files, strict=True)} if ranks.first else {}


def _members(task: Task, context: Context) -> dict[str, Experiment]:
    """The experiments whose folders the task still has to fill, by folder, in their order."""
    named = task.args.get("members")
    experiments = [context.experiment] if named is None else [Experiment.model_validate(body) for body in named]
    folders = {Lineage(each, context.store).run_folder(): each for each in experiments}
    return {folder: folders[folder] for folder in task.folders}


def _reads(context: Context, train: Train, folder: str, manifest: Mapping[str, Any], ranks: Gang) -> CheckedReads:
    """Where the blocks come from: through a cache if there is one, hashed where that costs no second transfer."""
    store = context.store
    if train.cache is not None:
        store = CachingStore(context.experiment.storage, train.cache, int(train.cache_limit))
    return CheckedReads(store, folder, manifest["files"], ranks.rank, ranks.world)


def _stream(blocks: Blocks, train: Train, manifest: Mapping[str, Any], ranks: Gang, device: torch.device) -> Stream:
    if train.loader == "litdata":
        from plmsae_cli.training.litdata_stream import LitDataStream

        return LitDataStream(blocks, manifest["chunk_rows"], train.batch_tokens, ranks.rank, ranks.world, device)
    return BlockStream(blocks, train.batch_tokens, train.seed, ranks.rank, ranks.world, device=device)


def _entropy(train: Train, manifest: Mapping[str, Any], stream: Stream) -> BatchEntropy | nullcontext[None]:
    """Nothing for data whose order is not known, or is not that of the blocks."""
    if train.loader == "litdata" or "seed" not in manifest:
        return nullcontext()
    return BatchEntropy(manifest["rows"], manifest["seed"], train.batch_tokens, stream.block_of)


def _train(experiment: Experiment) -> Train:
    assert experiment.train is not None
    return experiment.train
