"""`keep`: what is given up once its purpose is served."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.runtime.progress import Reporter
from plmsae_cli.runtime.run_folder import pointing_runs, read_yaml
from plmsae_cli.store.fs import Store, is_remote, join
from plmsae_cli.store.housekeeping import free
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.manifest import read_manifest, verify

_STAGES = ("embed", "shuffle", "optimize")


def free_unkept(experiment: Experiment, store: Store, reporter: Reporter, later: Sequence[Experiment] = ()) -> None:
    """Give up what `keep` does not want, once the dataset made from it is finished and its files are what they should be.

    What another run reads stays: one under this `root` or `data_root`, one of `later`, which the queue has yet to start, and
    a trial that is not done. A trial itself frees nothing; its sweep does.
    """
    unwanted = [
        s for s, kept in (("embed", experiment.keep.activations), ("shuffle", experiment.keep.buckets)) if not kept
    ]
    if not unwanted or (
        Path(experiment.root).name == "trials" and (Path(experiment.root).parent / "sweep.json").exists()
    ):
        return
    owners = [experiment, *_trials_with_data_of_their_own(experiment)]
    verified: set[str] = set()
    candidates: dict[str, str] = {}
    for chain in (chain for owner in owners for chain in _chains(owner, store)):
        if "optimize" in chain and read_manifest(store, chain["optimize"]) is not None:
            there = [chain[stage] for stage in unwanted if read_manifest(store, chain[stage]) is not None]
            candidates |= dict.fromkeys(there, chain["optimize"])

    def is_read(folder: str) -> bool:
        try:
            reader = _readers(experiment, [*owners, *later], store).get(os.path.basename(folder))
        except UserError as error:
            reporter.say(f"kept {folder} (keep): {error}")
            return True
        if reader is not None:
            reporter.say(f"kept {folder} for now: {reader} still reads it (keep)")
        return reader is not None

    for folder, dataset in candidates.items():
        if is_read(folder):
            continue
        if dataset not in verified:
            if problems := verify(store, dataset):
                raise UserError(
                    "the dataset is damaged, so nothing it was made from is freed:\n  " + "\n  ".join(problems),
                    f"`plmsae verify {dataset}` says how to make a file again",
                )
            verified.add(dataset)
            if is_read(folder):  # to read the dataset took its time
                continue
        if (freed := free(store, folder)) is not None:
            reporter.say(f"freed {freed:,} bytes: {folder} (keep)")


def _trials_with_data_of_their_own(experiment: Experiment) -> Iterator[Experiment]:
    from plmsae_cli.stages.sweep import trials

    if experiment.swept:
        for trial in trials(experiment):
            if any(name.partition(".")[0] in ("model", *_STAGES) for name in trial.values):
                yield trial.experiment


def _chains(experiment: Experiment, store: Store) -> Iterator[dict[str, str]]:
    """For each layer the folders that an experiment makes, by stage, in the order in which it makes them."""
    if experiment.embed is not None:
        lineage = Lineage(experiment, store)
        stages = [stage for stage in _STAGES if getattr(experiment, stage) is not None]
        for layer in experiment.embed.layers:
            yield {stage: getattr(lineage, stage)(layer).folder for stage in stages}


def _readers(experiment: Experiment, planned: Iterable[Experiment], store: Store) -> dict[str, str]:
    """Names of the data folders that anybody still reads, and who. Raises UserError where a run's record is damaged."""
    found: dict[str, str] = {}
    own = os.path.realpath(Lineage(experiment, store).run_folder())
    roots = {experiment.root, *([experiment.data_folder()] if not is_remote(experiment.data_folder()) else [])}
    for root in sorted(roots):
        for run, pointers in pointing_runs(Path(root)):
            if os.path.realpath(run) == own or ".archived-" in run.name:
                continue
            chains: dict[str, dict[str, str]] = {}
            for name, pointer in pointers.items():
                stage, _, role = name.partition("-")
                if (
                    stage in _STAGES
                ):  # a run may have started elsewhere: the name of the folder, which holds the key, counts
                    place = join(experiment.data_folder(), os.path.basename(pointer["folder"].rstrip("/")))
                    chains.setdefault(role, {})[stage] = place
            settings = read_yaml(run / "resolved.yaml") or {}
            for chain in chains.values():
                found |= dict.fromkeys(_needed(chain, settings, store), str(run))
    for other in planned:
        try:
            for chain in _chains(other, store):
                found |= dict.fromkeys(
                    _needed(chain, other.dump(), store), f"{other.root}/{other.name}, which is yet to run,"
                )
        except UserError:
            continue  # what it starts from is not there, so it shares nothing that is
    return found


def _needed(chain: Mapping[str, str], settings: Mapping[str, Any], store: Store) -> set[str]:
    """Names of the folders that are still read, or are what was asked for: all until the last is finished, then that one.

    Feature pages of training rows read the activations too, which lie in the order of proteins there alone.
    """
    folders = [chain[stage] for stage in _STAGES if stage in chain]
    wanted = [stage for stage in _STAGES if settings.get(stage) is not None]
    if wanted and wanted[-1] in chain and read_manifest(store, folders[-1]) is not None:
        features = (settings.get("eval") or {}).get("features") or {"split": "none"}
        folders = [*folders[-1:], *([chain["embed"]] if features["split"] == "train" and "embed" in chain else [])]
    return {os.path.basename(folder) for folder in folders}
