"""Imported first: lets a machine without pyarrow time what neither reads nor writes tables."""

from __future__ import annotations

import importlib.util
import sys
from unittest.mock import MagicMock

if importlib.util.find_spec("pyarrow") is None:
    for name in ("pyarrow", "pyarrow.parquet", "pyarrow.compute"):
        sys.modules[name] = MagicMock()
