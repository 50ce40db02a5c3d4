"""The codes of one concept test: the dictionary and its nulls."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import cache

from torch import Tensor

from plmsae_cli.evaluation.concepts.codes import Code, Directions, principal, residual
from plmsae_cli.evaluation.concepts.counts import BatchLabels
from plmsae_cli.evaluation.concepts.labelling import Labelled
from plmsae_cli.evaluation.frame import Scope
from plmsae_cli.evaluation.proteins import piece
from plmsae_cli.evaluation.rows import Rows, encode_rows, group_residues
from plmsae_cli.runtime.models import build_model, model_config
from plmsae_cli.runtime.saved import load_sae_with_facts, open_blocks
from plmsae_cli.sae.interface import Latents
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.weights import save_model

SAE = "sae"
SAMPLE_ROWS = 100_000
RANDOM_SEED = 0
"""Of the random model's weights."""


@dataclass(eq=False)
class Source:
    """A code, where its activations come from, and whether it is scored on rotated labels."""

    name: str
    code: Code
    rows: Rows
    rotated: bool = False


def read(
    labelled: Labelled,
    sources: Sequence[Source],
    proteins: Sequence[int],
    index: int,
    of: int,
    check_stop: Callable[[], None],
    progress: Callable[[float, float], None],
) -> Iterator[tuple[list[int], Source, Latents, BatchLabels]]:
    """Places in `proteins` of a group, a source, its latents and its labels: every source of a group, group after group of
    piece `index` of `of`.

    What sources share is computed once a group.
    """
    device = sources[0].rows.device
    sequences = [labelled.sequences[p] for p in proteins]
    batches = piece([len(sequence) for sequence in sequences], group_residues(device), index, of)
    rows: dict[int, Tensor] = {}
    latents: dict[int, Latents] = {}
    for done, places in enumerate(batches):
        check_stop()
        rows.clear()
        latents.clear()
        some = [proteins[place] for place in places]
        labels = {r: labelled.batch(some, device, r) for r in {source.rotated for source in sources}}
        for source in sources:
            if id(source.rows) not in rows:
                rows[id(source.rows)] = source.rows.of([sequences[place] for place in places])
            if id(source.code) not in latents:
                latents[id(source.code)] = encode_rows(source.code, rows[id(source.rows)])
            yield places, source, latents[id(source.code)], labels[source.rotated]
        progress(done + 1, len(batches))


@contextmanager
def open_sources(
    scope: Scope, nulls: Sequence[str], batch_tokens: str | int, check_stop: Callable[[], None]
) -> Iterator[list[Source]]:
    """The dictionary and the wanted nulls, in that order.

    `residual` and `pca` take their maxima and directions from the first 100,000 training rows, which are shuffled;
    `random_model` the signed dimensions of the same layer of a model of the same shape with random weights, its maxima from
    training proteins.
    """
    with ExitStack() as stack:
        rows = Rows(scope, batch_tokens, check_stop)
        sae = load_sae_with_facts(scope.folder, scope.store).model.to(rows.device)
        sources = [Source(SAE, sae, rows)]

        @cache
        def sample_RD() -> Tensor:  # half a gigabyte, of which the other nulls need nothing
            blocks = open_blocks(scope.dataset, scope.store)
            return blocks.decode(blocks.read(0, min(blocks.num_rows, SAMPLE_ROWS)))

        for null in nulls:
            if null == "shuffled":
                sources.append(Source(null, sae, rows, rotated=True))
            elif null == "random_model":
                weights = stack.enter_context(_random_weights(scope))
                other = Rows(scope, batch_tokens, check_stop, weights)
                sources.append(
                    Source(null, residual(other.of(_training_sequences(scope)).cpu()).to(other.device), other)
                )
            else:
                made: Directions = {"residual": residual, "pca": principal}[null](sample_RD())
                sources.append(Source(null, made.to(rows.device), rows))
        yield sources


@contextmanager
def _random_weights(scope: Scope) -> Iterator[str]:
    """A folder with random weights in the shape of the model."""
    config = model_config(scope.lineage.weights)
    with tempfile.TemporaryDirectory() as folder:
        model = build_model(config)
        model.init_weights(RANDOM_SEED)
        save_model(Store(), folder, dict(model.state_dict()), asdict(config), {})
        del model
        yield folder


def _training_sequences(scope: Scope) -> list[str]:
    """The first training proteins, up to a tenth of the sample's rows: a forward pass a row, not a read."""
    from plmsae_cli.store.proteins import sequences_of  # pulls pyarrow in, which counting can do without

    chosen, used = [], 0
    for sequence in sequences_of(scope.store, join(scope.dataset, "proteins.parquet"), "train"):
        chosen.append(sequence)
        used += len(sequence)
        if used >= SAMPLE_ROWS // 10:
            break
    return chosen
