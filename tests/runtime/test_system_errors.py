"""What the system refuses is told in words; what nobody foresaw keeps its traceback."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.runtime.system_errors import as_user_error


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EROFS, "who may write there"),
        (errno.EACCES, "who may write there"),
        (errno.ENOTDIR, "a file, not a folder"),
        (errno.EMFILE, "ulimit -n"),
    ],
)
def test_a_refusal_names_the_file_and_the_remedy(number: int, remedy: str) -> None:
    words = as_user_error(OSError(number, os.strerror(number), "runs/one/metrics.jsonl"))
    assert words is not None
    assert words.message == f"runs/one/metrics.jsonl: {os.strerror(number)}"
    assert words.hint is not None
    assert remedy in words.hint


def test_memory_that_does_not_suffice_on_either_device() -> None:
    with pytest.raises(RuntimeError) as raised:
        torch.zeros(2**50)  # more than a processor can address
    on_a_gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")
    for error in (MemoryError(), on_a_gpu, raised.value):
        words = as_user_error(error)
        assert words is not None
        assert words.message.startswith("out of memory.")
        assert "more" not in words.message
        assert words.hint is not None
        assert "train.batch_tokens" in words.hint


def test_users_errors_stay_and_others_are_nobodys() -> None:
    error = UserError("m", "h")
    assert as_user_error(error) is error
    assert as_user_error(ConnectionResetError(errno.ECONNRESET, "reset")) is None
    assert as_user_error(RuntimeError("bug")) is None


def test_triton_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build = pytest.importorskip("triton.runtime.build")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError) as raised:
        build._build("launcher", "launcher.c", str(tmp_path), [], [], [], [])
    words = as_user_error(raised.value)
    assert words is not None
    assert "C compiler" in words.message
    assert words.hint is not None
    assert "apt-get install gcc" in words.hint
