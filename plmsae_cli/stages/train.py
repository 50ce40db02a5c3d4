"""Dataset to a trained model. One task on as many ranks as asked; a pLM first writes its token shards."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment, Train
from plmsae_cli.runtime.device import count_gpus
from plmsae_cli.runtime.task import Artifact, Context, Plan, Resources, Result, Task
from plmsae_cli.stages.common import (
    FINISH,
    artifact,
    finish_task,
    made_parts,
    manifest_facts,
    remaining,
    require_manifest,
)
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.manifest import read_manifest

if TYPE_CHECKING:
    from plmsae_cli.sae.dictionary import Dictionary

TRAIN = "train"


def plan(experiment: Experiment, store: Store) -> Plan:
    train = experiment.train
    assert train is not None
    lineage = Lineage(experiment, store)
    return _plan_sae(lineage, train) if train.kind == "sae" else _plan_plm(lineage, train)


def ranks(experiment: Experiment) -> int:
    """Processes of the gang: as asked, else one a GPU, else one, on every node. A cluster's GPUs are not seen from here."""
    launch = experiment.launch
    if launch.executor != "local":
        return launch.nodes if launch.ranks == "auto" else launch.ranks
    gpus = count_gpus(launch)
    if launch.ranks == "auto":
        return launch.nodes * max(1, gpus)
    if gpus and launch.ranks > launch.nodes * gpus:
        where = f" of each of {launch.nodes} nodes" if launch.nodes > 1 else ""
        raise UserError(
            f"launch.ranks asks for {launch.ranks} ranks on {gpus} GPU(s){where}", "lower launch.ranks or use auto"
        )
    return launch.ranks


def _run_task(lineage: Lineage, needs: tuple[str, ...], steps: int) -> Task:
    gang = ranks(lineage.experiment)
    launch = lineage.experiment.launch
    gpus = gang if launch.gpus != 0 and (launch.executor != "local" or count_gpus(launch)) else 0
    return Task(TRAIN, "train", (lineage.run_folder(),), needs, Resources(gpus=gpus, gang=gang), cost=float(steps))


def _run_artifact(lineage: Lineage, tasks: list[Task], tokens: int) -> Artifact:
    from plmsae_cli.config.base import digest

    folder = lineage.run_folder()
    return Artifact(folder, digest(lineage.run_identity()), all(folder not in t.folders for t in tasks), tokens)


def _plan_sae(lineage: Lineage, train: Train) -> Plan:
    from plmsae_cli.training.prediction import state_bytes
    from plmsae_cli.training.sae_objective import outline, peak_rate
    from plmsae_cli.training.stream import steps_per_epoch

    experiment, store = lineage.experiment, lineage.store
    dataset = lineage.dataset()
    manifest = read_manifest(store, dataset.folder)
    if train.data is not None and manifest is not None and train.layer not in (None, manifest["layer"]):
        raise UserError(
            f"train.layer is {train.layer}, but {train.data} holds layer {manifest['layer']}",
            "remove train.layer, or name the dataset of that layer",
        )
    if train.imported is not None:
        from plmsae_cli.stages import imported_sae

        return imported_sae.plan(lineage, train.imported)
    rows, d = (manifest["rows"], manifest["d"]) if manifest else (lineage.scan.num_rows, lineage.d)
    per_epoch = steps_per_epoch(rows, train.batch_tokens, ranks(experiment))
    steps = train.steps(per_epoch)
    row_bytes = manifest["bytes"] // rows if manifest else lineage.row_bytes
    model = outline(train, d, ranks(experiment))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    step_bytes = model.step_bytes(train.batch_tokens // ranks(experiment))
    tasks = remaining(store, [_run_task(lineage, (), steps)])
    figures = {
        "dataset": dataset.folder,
        "rows": rows,
        "steps": steps,
        "tokens": steps * train.batch_tokens,
        "epochs": round(steps / per_epoch, 3),
        "unseen_rows_per_epoch": rows % train.batch_tokens,
        "batch_tokens": train.batch_tokens,
        "batch_tokens_per_rank": train.batch_tokens // ranks(experiment),
        "ranks": ranks(experiment),
        "architecture": train.autoencoder().architecture,
        "latents": model.num_latents,
        "parameters": parameters,
        "lr": float(f"{peak_rate(train, model, steps):.4g}"),
        # Weights in float32 and the optimiser's state; gradients, with the fused step's copies; what a step holds.
        "memory_per_rank": parameters * (4 + state_bytes(train)) // _owners(experiment, model)
        + 4 * parameters
        + step_bytes,
        "memory_of_step": step_bytes,
        **(_hours(experiment, model, steps, row_bytes) if tasks else {}),
    }
    return Plan("train", tasks, {"run": _run_artifact(lineage, tasks, steps * train.batch_tokens)}, figures)


def _owners(experiment: Experiment, model: Dictionary) -> int:
    """Ranks that share the weights and the optimiser's state: all of those that train by fused kernels."""
    from plmsae_cli.training.prediction import may_fuse

    train = experiment.train
    assert train is not None
    world = ranks(experiment)
    return world if count_gpus(experiment.launch) > 0 and may_fuse(model, train, world) else 1


def _hours(experiment: Experiment, model: Dictionary, steps: int, row_bytes: int) -> dict[str, str | float]:
    """See `training.prediction`."""
    from plmsae_cli.training.prediction import forecast

    train = experiment.train
    assert train is not None
    return forecast(model, train, steps, row_bytes, _present(experiment), experiment.price.gpu_hour)


def _plan_plm(lineage: Lineage, train: Train) -> Plan:
    from plmsae_cli.stages import tokens as tokens_of
    from plmsae_cli.training.plm_model import plm_config

    plm = train.plm
    assert plm is not None
    tokens_of.sources(plm)  # refuses names before anything runs
    config = plm_config(plm)
    most = None if plm.speedrun is None else plm.speedrun.max_parameters
    if most is not None and config.num_parameters > most:
        raise UserError(
            f"train.plm.speedrun.max_parameters is {most:,}, the model has {config.num_parameters:,} parameters",
            "lower train.plm.num_layers or hidden_size, or leave the race",
        )
    gang = ranks(lineage.experiment)
    if (train.batch_tokens // plm.pack_tokens) % gang:
        raise UserError(
            f"train.batch_tokens is {train.batch_tokens // plm.pack_tokens} packs, which {gang} ranks cannot share",
            f"make it a multiple of {gang * plm.pack_tokens} (plm.pack_tokens x ranks)",
        )
    ref = lineage.tokens()
    proteins = tokens_of.figures(lineage)
    tokens = proteins["tokens_per_epoch"]
    steps = max(1, (train.tokens or tokens) // train.batch_tokens)
    make = Task("tokens", "train", (ref.folder,), cost=tokens / 1e6)
    finish = finish_task("train", [ref], [make], {"tokens": tokens, "proteins": proteins["proteins"]})
    tasks = remaining(lineage.store, [make, finish, _run_task(lineage, (FINISH,), steps)])
    figures = {
        **proteins,
        "steps": steps,
        "tokens": steps * train.batch_tokens,
        "epochs": round(steps * train.batch_tokens / tokens, 3),
        "ranks": gang,
        "packs_per_step": train.batch_tokens // plm.pack_tokens,
        "architecture": plm.architecture,
        "parameters": config.num_parameters,
        **_optimizer_table(train),
        **(_plm_hours(lineage.experiment, proteins.get("mean_context"), steps * train.batch_tokens) if tasks else {}),
    }
    artifacts = {
        "tokens": artifact(lineage.store, ref, tokens, tokens, {}),
        "run": _run_artifact(lineage, tasks, steps * train.batch_tokens),
    }
    return Plan("train", tasks, artifacts, figures)


def _plm_hours(experiment: Experiment, context: float | None, tokens: int) -> dict[str, str]:
    """See `training.prediction`; without a known context, that of documents half as long as allowed."""
    from plmsae_cli.training.plm_model import plm_config, train_flops
    from plmsae_cli.training.prediction import forecast_plm

    assert experiment.train is not None
    plm = experiment.train.plm
    assert plm is not None
    flops = train_flops(
        plm_config(plm), context or plm.max_length / 2, plm.mask_rate if plm.objective == "mlm" else 0.5
    )
    return forecast_plm(flops, tokens, _present(experiment), experiment.price.gpu_hour)


def _present(experiment: Experiment) -> tuple[str, int] | None:
    """Name and number of the GPUs that a launch uses; None where it uses none."""
    import torch

    gpus = ranks(experiment) if count_gpus(experiment.launch) else 0
    return (torch.cuda.get_device_name(0), gpus) if gpus else None


def _optimizer_table(train: Train) -> dict[str, str]:
    from plmsae_cli.runtime.models import build_model, shapes_alone
    from plmsae_cli.training.plm_model import optimizer_table, parameter_groups, plm_config

    assert train.plm is not None
    with shapes_alone():
        model = build_model(plm_config(train.plm))
    return optimizer_table(parameter_groups(model, train), train)


def work(task: Task, context: Context) -> Mapping[str, Result]:
    from plmsae_cli.stages import tokens

    if task.id == "tokens":
        return tokens.write(task, context)
    if task.id == FINISH:
        (folder,) = task.folders
        planned = {k: task.args[k] for k in ("tokens", "proteins")}
        return {folder: manifest_facts(task, folder, planned | made_parts(task, context.store, folder)["tokens"].facts)}
    train = context.experiment.train
    assert train is not None
    if train.kind == "plm":
        return _train_plm(task, context, train)
    if train.imported is not None:
        from plmsae_cli.stages import imported_sae

        return imported_sae.work(task, context, train.imported)
    from plmsae_cli.stages import train_sae

    return train_sae.work(task, context)


def _train_plm(task: Task, context: Context, train: Train) -> Mapping[str, Result]:
    from plmsae_cli.runtime.device import pick_device, training_dtype
    from plmsae_cli.runtime.dist import gang
    from plmsae_cli.runtime.run_folder import RunFolder
    from plmsae_cli.stages import tokens
    from plmsae_cli.store.weights import save_model
    from plmsae_cli.training.loop import Diverged, Training, fit
    from plmsae_cli.training.packs import Packs
    from plmsae_cli.training.plm_objective import PLMObjective

    plm = train.plm
    assert plm is not None
    lineage = Lineage(context.experiment, context.store)
    manifest = require_manifest(context.store, lineage.tokens().folder)
    sets = tokens.read(context.store, lineage.tokens().folder, manifest, plm)
    size, longest = plm.pack_tokens, plm.max_length + 2
    own = sets.pop("train")
    packs = Packs(own.shards, size, longest, train.seed, own.documents)
    valid = {
        name: Packs(each.shards, size, longest, None, each.documents, packs.room)
        for name, each in sets.items()
        if len(each.documents.length_P)
    }
    steps = max(1, (train.tokens or packs.num_tokens) // train.batch_tokens)
    run = RunFolder(task.folders[0])
    with gang() as ranks_:
        device = pick_device(ranks_.local_rank)
        compute = training_dtype(train.compute, device)
        objective = PLMObjective(train, packs, valid, steps, ranks_, device, compute)

        def lost(training: Training, error: Diverged) -> None:
            raise error

        training = Training(objective, steps, context.experiment, run, ranks_)
        fit([training], ranks_, context.progress, lost)
        steps = training.total_steps
        valid_figures = objective.score(steps)
        files = []
        if ranks_.first:
            facts: dict[str, Any] = {
                "tokens": steps * train.batch_tokens,
                "steps": steps,
                "train_seconds": objective.clock.seconds,
                "parameters": objective.config.num_parameters,
                "data": lineage.tokens().key,
                "train": train.science(),
                "valid": valid_figures,
                "unigram_entropy": tokens.unigram_entropy(manifest["residue_counts"]),
            }
            state = {k: v.detach().cpu() for k, v in objective.released().items()}
            files = save_model(context.store, join(task.folders[0], "plm"), state, asdict(objective.config), facts)
    return {task.folders[0]: Result(files, {"steps": steps, "valid": valid_figures})}
