"""Where the work runs, and what it may take: the sections `launch`, `price` and `limits`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from plmsae_cli.config.base import Auto, Bytes, Count, NotNegative, Section, Whole, rule


class Ray(Section):
    """Options of `launch.executor: ray`."""

    address: str | None = "auto"
    """`auto`: the cluster this machine belongs to (`ray start`); `host:6379` or `ray://host:10001`: another; null: this
    machine alone, for as long as the command runs."""
    cpus: Count = 1
    """Cores of one task."""
    retries: Whole = 3
    """How often a task is begun again when its worker or node is lost."""


class Slurm(Section):
    """Options of `launch.executor: slurm`; what is left out is the cluster's default."""

    partition: str | None = None
    """Partition that the jobs wait in."""
    account: str | None = None
    """Account that pays."""
    time: Count = 240
    """Minutes a task may take before the system ends it."""
    array: Count = 256
    """Most tasks of a job array at work at the same time."""
    cpus: Count = 4
    """Cores of one task."""
    options: dict[str, str | int] = Field(default_factory=dict)
    """Further options of sbatch by their long names, such as `{qos: high, constraint: a100}`."""


class Launch(Section):
    """Where the work runs: the only section that changes between a laptop, a box and a cluster."""

    executor: Literal["local", "ray", "slurm"] = "local"
    """`local`: processes on this machine. `ray` (`pip install plmsae[ray]`) and `slurm` (`plmsae[slurm]`): a cluster does the
    work; all machines must see the same paths."""
    gpus: Auto | Whole | Annotated[list[Whole], Field(min_length=1)] = "auto"
    """GPUs to use: `auto` all that are visible, 0 none (the CPU computes), a number that many, a list such as `[0, 3]` these. On
    a cluster: 0 asks for none, anything else for one where a task can use it, and one for each rank of a training."""
    ranks: Auto | Count = "auto"
    """Processes of one training run; `auto` is one a GPU of this machine, one on a CPU, on a cluster and for a trial of a
    sweep. On several `nodes` all of them together."""
    nodes: Count = 1
    """Machines that share one training run. With `executor: local` the same `plmsae train` is started on each; with `slurm` the
    job has so many nodes."""
    rendezvous: str | None = None
    """`host:port` at which the machines of `nodes` find each other: one of them, and a port that is free there."""
    patience: Count = 300
    """Seconds without a sign of life after which a rank counts as lost, and training ends with its name."""
    workers: Auto | Count = "auto"
    """Processes that share the tasks of the other stages, and trials of a sweep at the same time; `auto` is one a GPU, one on
    a CPU."""
    io_speed: Bytes | None = None
    """Bytes a second that a machine reads, and writes meanwhile, for the times that `--dry-run` predicts; null: as
    measured by tasks that have run, else 1GB."""
    ray: Ray = Ray()
    """Options of `executor: ray`."""
    slurm: Slurm = Slurm()
    """Options of `executor: slurm`."""

    @model_validator(mode="after")
    def _options_have_an_effect(self) -> Launch:
        for name in ("ray", "slurm"):
            if self.executor != name and self.changed(name):
                raise rule(
                    name,
                    f"launch.{name} has no effect with executor: {self.executor}",
                    f"remove it or use executor: {name}",
                )
        if self.executor == "local" and (self.nodes > 1) != (self.rendezvous is not None):
            raise rule(
                "rendezvous",
                "several nodes need a rendezvous, and one node has none",
                "write `nodes: 2` and `rendezvous: host:29500`, or neither",
            )
        if self.executor != "local" and self.changed("rendezvous"):
            raise rule("rendezvous", f"rendezvous has no effect with executor: {self.executor}", "remove it")
        if self.executor == "ray" and self.nodes > 1:
            raise rule("nodes", "nodes has no effect with executor: ray, which places ranks itself", "set ranks")
        if self.executor != "local" and isinstance(self.gpus, list):
            raise rule("gpus", f"gpus is a list, and executor: {self.executor} chooses GPUs itself", "write a number")
        if self.ranks != "auto" and self.ranks % self.nodes:
            raise rule(
                "ranks", f"{self.ranks} ranks do not share evenly between {self.nodes} nodes", "a multiple of nodes"
            )
        if self.executor != "local" and self.workers != "auto":
            where = "slurm.array" if self.executor == "slurm" else "the size of the cluster"
            raise rule(
                "workers", f"workers has no effect with executor: {self.executor}", f"{where} decides; remove it"
            )
        return self.require_each_once("gpus")


class Price(Section):
    """What things cost, in dollars; where set, dollars stand beside hours, bytes and requests in `--dry-run`."""

    gpu_hour: NotNegative | None = None
    """One GPU for an hour."""
    tb_day: NotNegative | None = None
    """Keeping 10^12 bytes for a day."""
    million_requests: NotNegative | None = None
    """A million requests to the object store."""


class Limits(Section):
    """What a start may take by its own plan. Beyond it nothing is begun, unless with `--yes`."""

    gpu_hours: NotNegative | None = None
    """Hours of GPUs that `embed` is predicted to take, all of them counted."""
    bytes: Bytes | None = None
    """Bytes of the data that would be made."""
    usd: NotNegative | None = None
    """Dollars by `price`: the GPU hours, the requests, and one day of keeping the new data."""
