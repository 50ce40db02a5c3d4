"""What failed to compile on this machine, told from its errors: what passes can do without."""

from __future__ import annotations

from importlib.util import find_spec
from subprocess import CalledProcessError

_NO_COMPILER = "Failed to find C compiler"
"""Triton's, as a plain RuntimeError."""


def compile_failed(error: Exception) -> bool:
    """Whether torch.compile raised this."""
    # Imported when something failed: they bring all of the compiler.
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return isinstance(error, (TorchDynamoException, InductorError))


def kernels_failed(error: Exception) -> bool:
    """Whether Triton raised this on our own kernels: no C compiler or no headers for it, no ptxas, too little shared memory."""
    if isinstance(error, CalledProcessError) or (isinstance(error, RuntimeError) and _NO_COMPILER in str(error)):
        return True
    if find_spec("triton") is None:
        return False
    from triton.errors import TritonError

    return isinstance(error, TritonError)
