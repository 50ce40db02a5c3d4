"""Room in a Ray cluster: whether work can ever fit there, and what is said while it waits for its turn."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from plmsae_cli.config.errors import UserError
from plmsae_cli.runtime.stop import STOP
from plmsae_cli.runtime.task import Interrupted

Amounts = Mapping[str, float]
"""Of `CPU`, `GPU`, `memory` [bytes]."""

SAY_AFTER_S = 5.0
"""A cluster with room places a gang sooner."""
SAY_CHANGES_EVERY_S = 10.0
SAY_EVERY_S = 60.0


def nodes(ray: Any) -> list[Amounts]:
    """What each node has. One that died is among them until the cluster has missed it, for some 20 s."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def grows(ray: Any) -> bool | None:
    """Whether something may add nodes by itself; None while a cluster that has just begun does not say."""
    read = ray.experimental.internal_kv._internal_kv_get
    if read("__autoscaler_v2_enabled", namespace=ray._raylet.GCS_AUTOSCALER_STATE_NAMESPACE) == b"1":
        return True
    status = json.loads(read("__autoscaling_status") or "{}")
    types = (status.get("autoscaler_report") or {}).get("node_type_mapping")
    # Where nobody said which types there are, the autoscaler looks on alone, and each node is a type of its own.
    return any(kind != f"node_{node}" for node, kind in types.items()) if types else None


def places(found: Sequence[Amounts], wanted: Amounts) -> int:
    """How many shares of `wanted` fit on these nodes when nothing else is there."""
    return sum(
        min((int(node.get(name, 0) // amount) for name, amount in wanted.items() if amount), default=0)
        for node in found
    )


def refuse(what: str, wanted: Amounts, found: Sequence[Amounts], count: int = 1, hint: str = "") -> UserError:
    """The error of work that these nodes never have room for.

    Args:
        what: `task map-00000 of shuffle`.
        count: shares that are wanted at the same time.
    """
    most = {name: max((node.get(name, 0) for node in found), default=0) for name in wanted}
    listed = ", ".join(f"{name} {amount:,.0f} (most on one node {most[name]:,.0f})" for name, amount in wanted.items())
    if count == 1:
        return UserError(f"no node of the Ray cluster can hold {what}: it asks for {listed}", hint)
    return UserError(
        f"the Ray cluster can never hold {what}: each asks for {listed}, and its {_counted(len(found), 'node')} have "
        f"room for {places(found, wanted)} of {count} even when nothing else runs there",
        hint,
    )


def wait_for_room(
    ray: Any,
    group: Any,
    wanted: Amounts,
    ranks: int,
    say: Callable[[str | None], None],
    may_join: bool,
) -> None:
    """Wait until a placement group has its place.

    Args:
        wanted: by each of the ranks.
        say: takes what is waited for: after some seconds, when it changes, and every minute; None when that is over.
        may_join: wait for nodes that are not there, though nothing adds them by itself.

    Raises:
        UserError: there will never be room.
        Interrupted: a wish to stop.
    """
    begun, said_at, said = time.monotonic(), 0.0, ""
    try:
        while not group.wait(1):
            if STOP.requested():
                raise Interrupted
            now = time.monotonic()
            fits = places(found := nodes(ray), wanted) >= ranks
            if not (fits or may_join) and grows(ray) is False:
                hint = (
                    "ask for less (launch.ranks, launch.ray.cpus), or start again when larger or more nodes are there"
                )
                raise refuse(f"the {_counted(ranks, 'rank')} of train", wanted, found, ranks, hint)
            if now - begun < SAY_AFTER_S or now - said_at < SAY_CHANGES_EVERY_S:
                continue
            words = describe(wanted, ranks, len(found), ray.cluster_resources(), ray.available_resources(), fits)
            if words != said or now - said_at >= SAY_EVERY_S:
                said_at, said = now, words
                say(words)
    finally:
        if said:
            say(None)


def describe(wanted: Amounts, ranks: int, count: int, total: Amounts, free: Amounts, fits: bool) -> str:
    """What ranks wait for, in a line.

    Args:
        count: nodes of the cluster.
        total: what they have together; `free`: what of that nobody has taken.
        fits: there would be room if nothing else ran.
    """
    asked = " and ".join(f"{amount:g} {name}" for name, amount in wanted.items() if amount)
    has = " and ".join(
        f"{total.get(name, 0):g} {name} ({total.get(name, 0) - free.get(name, 0):g} taken)"
        for name, amount in wanted.items()
        if amount
    )
    line = f"waiting for room in the Ray cluster: {_counted(ranks, 'rank')} with {asked} each; "
    line += f"{_counted(count, 'node')} with {has}"
    if not fits:
        return f"{line}: a node has to join first"
    enough = all(free.get(name, 0) >= amount * ranks for name, amount in wanted.items())
    return f"{line}; what a rank asks for must be free on one node" if enough else line


def _counted(count: int, name: str) -> str:
    return f"{count} {name}" if count == 1 else f"{count} {name}s"
