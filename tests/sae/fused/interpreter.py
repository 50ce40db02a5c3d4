"""Triton's interpreter, with what it gets wrong put right."""

from __future__ import annotations

import os
from typing import Any

import numpy as np


def correct() -> None:
    """bfloat16 is rounded to nearest (not cut off) and multiplied as such (not as its bits); loops take loaded bounds.

    And a quarter of its time is saved: it patches the whole language at every call of a device function, where what the
    kernel's launch has patched still holds; only the modules of those functions need it, once.
    """
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    import triton.language as tl
    from triton.runtime import interpreter

    def to_float(data: np.ndarray) -> np.ndarray:
        return (data.astype(np.uint32) << 16).view(np.float32)

    def to_bfloat16(data: np.ndarray) -> np.ndarray:
        bits = np.ascontiguousarray(data, dtype=np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).reshape(data.shape)

    def cast(self: Any, source: Any, kind: Any) -> Any:
        before, after = source.dtype.scalar, kind.scalar
        if (before, after) == (tl.bfloat16, tl.float32):
            return interpreter.TensorHandle(to_float(source.data), after)
        if (before, after) == (tl.float32, tl.bfloat16):
            return interpreter.TensorHandle(to_bfloat16(source.data), after)
        return plain_cast(self, source, kind)

    def dot(self: Any, a: Any, b: Any, c: Any, *_: Any) -> Any:
        left, right = (to_float(x.data) if x.dtype.scalar == tl.bfloat16 else x.data for x in (a, b))
        return interpreter.TensorHandle(np.matmul(left, right, dtype=np.float32) + c.data, c.dtype.scalar)

    def patch_tensor(tensor: Any, scope: Any) -> None:
        plain_patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = id(self.fn.__globals__)
        if module not in patched:
            patched.add(module)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    patched: set[int] = set()
    interpreter.InterpretedFunction.__call__ = call
    builder = interpreter.InterpreterBuilder
    plain_cast, plain_patch = builder.cast_impl, interpreter._patch_lang_tensor
    builder.cast_impl, builder.create_dot, interpreter._patch_lang_tensor = cast, dot, patch_tensor
