"""`keep`: what is given up once its purpose is served."""

from __future__ import annotations

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.runtime.progress import Reporter
from plmsae_cli.store.fs import Store
from plmsae_cli.store.housekeeping import free
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.manifest import read_manifest, verify


def free_unkept(experiment: Experiment, store: Store, reporter: Reporter) -> None:
    """Give up what `keep` does not want, once the dataset made from it is finished and its files are what they should be."""
    unwanted = [
        s for s, kept in (("embed", experiment.keep.activations), ("shuffle", experiment.keep.buckets)) if not kept
    ]
    if not unwanted:
        return
    assert experiment.embed is not None
    lineage = Lineage(experiment, store)
    for layer in experiment.embed.layers:
        dataset = lineage.optimize(layer).folder
        folders = [getattr(lineage, stage)(layer).folder for stage in unwanted]
        folders = [folder for folder in folders if read_manifest(store, folder) is not None]
        if not folders or read_manifest(store, dataset) is None:
            continue
        if problems := verify(store, dataset):
            raise UserError(
                "the dataset is damaged, so nothing it was made from is freed:\n  " + "\n  ".join(problems),
                f"`plmsae verify {dataset}` says how to make a file again",
            )
        for folder in folders:
            reporter.say(f"freed {free(store, folder):,} bytes: {folder} (keep)")
