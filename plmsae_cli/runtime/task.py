"""Tasks: the unit of work, of resuming and of scheduling.

A stage plans a list of frozen tasks and works one at a time; an executor is only a scheduler between the two. A task is
done when every folder it writes to holds its part record with files of the recorded sizes; nothing else is consulted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

from plmsae_cli.config.experiment import Experiment
from plmsae_cli.store.fs import FileRecord, Store


@dataclass(frozen=True)
class Resources:
    """What one task occupies while it runs."""

    gpus: int = 0
    gang: int = 1
    """Processes that work on it together (torchrun); 1 for all but training."""
    memory: int = 0
    """Peak bytes expected."""


@dataclass(frozen=True)
class Task:
    """One idempotent piece of work. Everything in it is plain JSON."""

    id: str
    """Unique within the folders it writes to; the part record's name."""
    stage: str
    folders: tuple[str, ...]
    """Artifacts it writes to; the part record goes into each."""
    needs: tuple[str, ...] = ()
    """Ids of tasks of the same plan that must be done before."""
    resources: Resources = Resources()
    cost: float = 1.0
    """Relative cost: rows, bytes or steps, for scheduling and progress."""
    args: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, body: Mapping[str, Any]) -> Task:
        return cls(
            id=body["id"],
            stage=body["stage"],
            folders=tuple(body["folders"]),
            needs=tuple(body["needs"]),
            resources=Resources(**body["resources"]),
            cost=body["cost"],
            args=dict(body["args"]),
        )


@dataclass(frozen=True)
class Artifact:
    """A folder that a plan makes, or finds made."""

    folder: str
    key: str
    done: bool
    rows: int = 0
    bytes: int = 0
    plan: Mapping[str, Any] | None = None
    """Choices fixed by the first start (shard ranges, bucket rows), stored as plan.json before any work."""
    of: str | None = None
    """The stage that a run points to it for, where that is not the plan's own."""


@dataclass(frozen=True)
class Plan:
    """What a stage would do: its tasks, its artifacts, and the figures a dry run shows."""

    stage: str
    tasks: Sequence[Task]
    artifacts: Mapping[str, Artifact]
    """Role (`layer-24`, `run`) -> artifact."""
    figures: Mapping[str, Any]
    """Plain values for people: rows, bytes, steps, memory."""
    note: str = ""
    """Why there is nothing to do, where it is not that a start before has done it."""

    @property
    def done(self) -> bool:
        return not self.tasks


@dataclass(frozen=True)
class Result:
    """What a work wrote into one folder."""

    files: Sequence[FileRecord] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


class Pending(Mapping[str, Result]):
    """Results of a work whose files are still being written: to look at them is to wait.

    An executor may start another task before it looks. Raises from any look what the writing raised.
    """

    def __init__(self, results: Mapping[str, Future[Result]]) -> None:
        self._results = results

    def __getitem__(self, folder: str) -> Result:
        return self._results[folder].result()

    def __iter__(self) -> Iterator[str]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)

    def settle(self) -> None:
        """Return when nothing is being written any more, whatever came of it."""
        wait(self._results.values())


class TaskFailed(RuntimeError):
    """A task raised; `trace` is the worker's traceback. `lost`: it raised nothing, its process went away."""

    def __init__(self, task: str, message: str, trace: str = "", lost: bool = False) -> None:
        super().__init__(f"{task}: {message}")
        self.task, self.message, self.trace, self.lost = task, message, trace, lost

    def __reduce__(self) -> tuple[type[TaskFailed], tuple[str, str, str, bool]]:
        return type(self), (self.task, self.message, self.trace, self.lost)


class Interrupted(Exception):
    """Asked to stop and stopped at a place from which the next start continues."""


class Context(Protocol):
    """What a work may lean on besides its task."""

    experiment: Experiment
    store: Store

    def progress(self, done: float, total: float, **figures: Any) -> None:
        """Tell how far this task is; cheap, throttled by the receiver."""

    def check_stop(self) -> None:
        """Raise Interrupted when the user has asked to stop."""


Work = Callable[[Task, Context], Mapping[str, Result]]
"""work(task, context) -> one result a folder, perhaps `Pending`; a member of a group that failed by
itself has none, and says so in its status."""
