"""Data as classic scripts: what a page may load from disk, where browsers allow neither fetch nor modules."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
import numpy.typing as npt

_ESCAPES = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}

_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def literal(body: Any) -> str:
    """JSON that is safe inside a script, whatever strings it holds; numbers that are not finite are null."""
    try:
        text = _ENCODER.encode(body)
    except ValueError:  # some number is not finite, which is rare and takes long to look for
        text = _ENCODER.encode(_finite(body))
    for letter, escape in _ESCAPES.items():  # str.translate would look at each letter, and nearly all are digits
        text = text.replace(letter, escape)
    return text


def script(name: str, body: Any) -> bytes:
    """The file `data/<name>.js`, which hands `body` to the page."""
    return f"plmsae.put({literal(name)},{literal(body)});\n".encode("utf-8", errors="replace")


def column(values: npt.ArrayLike, dtype: str) -> dict[str, str]:
    """Numbers as little-endian bytes: `type` one of f4, u1, u2, u4, `data` in base64."""
    raw = np.asarray(values).astype(np.dtype(dtype).newbyteorder("<"))
    return {"type": dtype, "data": base64.b64encode(raw.tobytes()).decode()}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
