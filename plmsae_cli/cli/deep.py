"""`validate --deep`: what only the outside can tell, a line a check."""

from __future__ import annotations

import base64
import http.client
import json
import netrc
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING
from urllib.parse import urlparse

from plmsae_cli.cli.show import bytes_to_make, nested, size
from plmsae_cli.cli.tokens import WANDB_KEY, wandb_login

if TYPE_CHECKING:
    from plmsae_cli.config.experiment import Experiment
    from plmsae_cli.runtime.checks import Check
    from plmsae_cli.runtime.task import Plan

_TIMEOUT = 10.0


def deep_checks(experiment: Experiment, plans: Sequence[Plan]) -> list[Check]:
    """Disks, buckets, memory and Weights & Biases, of what the experiment uses of them."""
    return [*_places(experiment, plans), _memory(experiment, plans), *_wandb(experiment)]


def _places(experiment: Experiment, plans: Sequence[Plan]) -> Iterator[Check]:
    """Disks have the room that the plans want; buckets let an object be written, read and deleted."""
    from plmsae_cli.runtime.checks import ROOM, bucket, folders, space
    from plmsae_cli.store.fs import is_remote

    wanted = bytes_to_make(plans)
    for field, place in folders(experiment).items():
        if is_remote(place):
            yield bucket(experiment, place, write=True)
        else:
            yield space(f"disk of {field}", place, max(ROOM, wanted if field == "data_root" else 0))
    data = experiment.train.data if experiment.train is not None else None
    if data is not None and is_remote(data):
        yield bucket(experiment, data, write=False)


def _memory(experiment: Experiment, plans: Sequence[Plan]) -> Check:
    """The most that a rank is predicted to hold, against the smallest GPU (or this machine's memory)."""
    from plmsae_cli.runtime.checks import Check
    from plmsae_cli.runtime.device import count_gpus, device_memory

    gpus = count_gpus(experiment.launch)
    there = device_memory(experiment.launch)
    where = f"{gpus} GPU(s) here" if gpus else "no GPU here, so it is this machine's memory"
    needs = [need for plan in plans if not plan.done for need in nested("memory_per_rank", plan.figures)]
    if not needs:
        return Check("memory", "ok", f"nothing is left to train; {size(there)} can be used, {where}")
    text = f"training is predicted to hold {size(max(needs))} a rank of {size(there)} that can be used, {where}"
    if max(needs) <= there:
        return Check("memory", "ok", text)
    return Check(
        "memory", "fail", text, "lower train.batch_tokens or train.sae.expansion, or share it: more launch.ranks"
    )


def _wandb(experiment: Experiment) -> Iterator[Check]:
    """Online: the key is known to the server. Nothing where W&B is not wanted."""
    from plmsae_cli.runtime.checks import Check

    if experiment.wandb.mode == "off":
        return
    if experiment.wandb.mode == "offline":
        yield Check("W&B", "ok", "offline: `wandb sync` uploads the runs later")
        return
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/")
    key = _key(url)
    if key is None:
        yield Check("W&B", "fail", "no key", "set WANDB_API_KEY, or `wandb login`, or wandb.mode: offline")
        return
    why = refused(url, key)
    remedy = "check WANDB_API_KEY or `wandb login --relogin`; wandb.mode: offline needs neither"
    yield Check("W&B", "ok", f"{url} knows the key") if why is None else Check("W&B", "fail", f"{url}: {why}", remedy)


def _key(url: str) -> str | None:
    """From where `wandb_login` finds it."""
    if wandb_login() == WANDB_KEY:
        return os.environ[WANDB_KEY]
    if wandb_login() is None:
        return None
    found = netrc.netrc(os.environ.get("NETRC")).authenticators(urlparse(url).hostname or "")
    return None if found is None else found[2]


def refused(url: str, key: str) -> str | None:
    """Why a server does not take a key, None where it does. The key is in no message."""
    body = json.dumps({"query": "query { viewer { username } }"}).encode()
    word = base64.b64encode(f"api:{key}".encode()).decode()
    headers = {"Content-Type": "application/json", "Authorization": f"Basic {word}"}
    request = urllib.request.Request(f"{url}/graphql", data=body, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as reply:
            viewer = (json.loads(reply.read()).get("data") or {}).get("viewer")
    except urllib.error.HTTPError as error:
        return "the key is not known" if error.code in (401, 403) else f"answers {error.code}"
    except (OSError, http.client.HTTPException, ValueError, AttributeError) as error:
        return f"does not answer ({type(error).__name__})"
    return None if viewer is not None else "the key is not known"
