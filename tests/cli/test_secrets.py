"""Secrets in the environment appear in no file of a run, not even in W&B's, and not on the screen."""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

NAMES = ("AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY", "HF_TOKEN")


def test_planted_secrets_appear_nowhere(start: Callable[..., Any], write: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    planted = {name: secrets.token_hex(20) for name in NAMES}
    path = write(more="launch: {ranks: 2}\nwandb: {mode: offline}\n", data=tmp_path / "data")
    process = start("run", path, "--no-progress", PLMSAE_CACHE=str(tmp_path / "cache"), **planted)
    assert process.wait() == 0, process.log
    assert "wandb sync" in (tmp_path / "runs" / "one" / "logs" / "rank-0.log").read_text()
    files = [file for file in tmp_path.rglob("*") if file.is_file()]
    names = {file.name for file in files}
    assert {"status.json", "environment.json", "gang.json", "torchrun.log", "MANIFEST.json", "index.html"} <= names
    assert any(file.suffix == ".wandb" and file.stat().st_size > 1000 for file in files)
    for file in files:
        content = file.read_bytes()
        for name, secret in planted.items():
            # Records of W&B may be cut in two: half a secret is one too many.
            assert secret[:16].encode() not in content, (name, file)
            assert secret[-16:].encode() not in content, (name, file)
    assert json.loads((tmp_path / "runs" / "one" / "status.json").read_text())["state"] == "done"


def test_a_secret_in_the_file_is_refused_without_showing_it(
    plmsae: Callable[..., Any], write: Callable[..., Path]
) -> None:
    path = write(more="wandb: {api_key: hunter2hunter2}\nstorage: {endpoint_url: 'https://me:hunter3@host'}\n")
    for arguments in (["run", path], ["train", path, "--set", "wandb.api_key=hunter2hunter2"]):
        refused = plmsae(*arguments)
        assert refused.code == 2
        assert "a secret does not belong in an experiment file" in refused.err
        assert "hunter" not in refused.err + refused.out
