from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
if not torch.cuda.is_available():
    _spec = importlib.util.spec_from_file_location("interpreter", Path(__file__).with_name("interpreter.py"))
    assert _spec is not None
    assert _spec.loader is not None
    _interpreter = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_interpreter)
    _interpreter.correct()


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as a GPU is given would only take the interpreter's time."""
    if not torch.cuda.is_available():
        from plmsae_cli.sae.fused import gradients, update

        monkeypatch.setattr(update, "PROGRAMS", 8)
        monkeypatch.setattr(gradients, "SPLITS", 4)
