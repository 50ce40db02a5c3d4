"""Keys of services that experiments want: asked for once, without echo, on a terminal only; kept in this process."""

from __future__ import annotations

import netrc
import os
import sys
from collections.abc import Iterable
from getpass import getpass
from typing import TYPE_CHECKING
from urllib.parse import urlparse

if TYPE_CHECKING:
    from plmsae_cli.config.experiment import Experiment

WANDB_KEY, HUB_TOKEN = "WANDB_API_KEY", "HF_TOKEN"


def wandb_login() -> str | None:
    """Where the key of Weights & Biases is from; None where there is none."""
    if os.environ.get(WANDB_KEY):
        return WANDB_KEY
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        found = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        return None
    return None if found is None else "netrc"


def ask(experiments: Iterable[Experiment]) -> None:
    """Ask for the key that `wandb.mode: online` wants and nothing has. An empty answer: see `keyed`."""
    wanted = any(experiment.wandb.mode == "online" for experiment in experiments)
    if not wanted or wandb_login() is not None or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return
    print("wandb.mode: online, and nobody is logged in (https://wandb.ai/authorize shows the key)", file=sys.stderr)
    if key := getpass("W&B API key (not shown; empty: offline): ", stream=sys.stderr).strip():
        os.environ[WANDB_KEY] = key


def ask_hub() -> None:
    """Ask for the token that an upload to the Hugging Face hub wants, where nothing has it. An empty answer: it is refused."""
    from plmsae_cli.runtime.hub.export import wants_token

    if not wants_token() or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return
    print("--push, and nobody is logged in (https://huggingface.co/settings/tokens makes a token)", file=sys.stderr)
    if token := getpass("Hugging Face token (not shown): ", stream=sys.stderr).strip():
        os.environ[HUB_TOKEN] = token


def keyed(experiment: Experiment) -> Experiment:
    """The experiment as it can run: W&B goes offline, with a word, where it was to be online and there is no key."""
    if experiment.wandb.mode != "online" or wandb_login() is not None:
        return experiment
    print(
        f"{experiment.name}: no W&B key, so the run is recorded offline and `wandb sync` uploads it later "
        f"(set {WANDB_KEY}, or `wandb login`)",
        file=sys.stderr,
    )
    wandb = experiment.wandb.model_copy(update={"mode": "offline"})
    return experiment.model_copy(update={"wandb": wandb})
