from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
pytest.importorskip("triton")
if not torch.cuda.is_available():
    _spec = importlib.util.spec_from_file_location("interpreter", Path(__file__).with_name("interpreter.py"))
    assert _spec is not None
    assert _spec.loader is not None
    _interpreter = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(_interpreter)
    _interpreter.correct()
