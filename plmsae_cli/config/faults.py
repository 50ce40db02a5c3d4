"""Injected faults: the tests' way to kill a process at a named point of its work.

`PLMSAE_FAULT="kill:embed.shard:3"` kills this process at its third pass of the point `embed.shard`.
The form is `action:point[:condition,...]`, several joined by `;`. A condition is the number of the pass
(default 1) or `key=value`, compared with what the point says of itself: `kill:train.step:rank=1,step=40`.
Only passes that meet every `key=value` are counted. Actions: `kill` (SIGKILL), `sigterm`, `stop` (SIGSTOP),
`raise` (InjectedFault).
"""

from __future__ import annotations

import os
import signal
from collections import Counter

_SIGNALS = {"kill": signal.SIGKILL, "sigterm": signal.SIGTERM, "stop": signal.SIGSTOP}
_passes: Counter[str] = Counter()


class InjectedFault(RuntimeError):
    """Raised by the action `raise`."""


def fault(point: str, **where: object) -> None:
    """Fail here if the environment asks for it; otherwise the cost is one look into it."""
    if "PLMSAE_FAULT" not in os.environ:
        return
    due = []
    for clause in os.environ["PLMSAE_FAULT"].split(";"):
        action, wanted_point, *rest = clause.split(":", 2)
        conditions = rest[0].split(",") if rest else []
        wanted = dict(c.split("=", 1) for c in conditions if "=" in c)
        if wanted_point == point and all(str(where.get(key)) == value for key, value in wanted.items()):
            _passes[clause] += 1
            if _passes[clause] == int(next((c for c in conditions if "=" not in c), "1")):
                due.append(action)
    for action in due:
        if action == "raise":
            raise InjectedFault(f"injected fault at {point}")
        os.kill(os.getpid(), _SIGNALS[action])
