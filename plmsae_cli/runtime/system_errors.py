"""What the system refuses (a full disk, a folder of somebody else, too little memory), put into words for users."""

from __future__ import annotations

import errno
import sys

from plmsae_cli.config.errors import UserError

_SPACE = "free some space or name another disk in root or data_root; the same command then continues"
_RIGHTS = "check who may write there, or name another folder in root or data_root"
_ON_A_CPU = "DefaultCPUAllocator: "
_HINTS = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: _SPACE,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a file is where a folder should be",
    errno.EISDIR: "a folder is where a file should be",
    errno.ENOLCK: "its disk cannot lock files (NFS without its lock service): name a folder on another one in root",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def as_user_error(error: BaseException) -> UserError | None:
    """The error in words: a UserError is one already; None for what nobody foresaw."""
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError) and error.errno in _HINTS:
        subject = f"{error.filename}: " if error.filename is not None else ""
        return UserError(f"{subject}{error.strerror}", _HINTS[error.errno])
    if isinstance(error, RuntimeError) and "Failed to find C compiler" in str(error):
        return UserError(
            "Triton finds no C compiler, and builds the launchers of GPU kernels with one",
            "on Debian and Ubuntu: apt-get install gcc python3-dev; elsewhere CC names one",
        )
    if _is_out_of_memory(error):
        first = (str(error).splitlines() or [""])[0].rpartition(_ON_A_CPU)[2]
        return UserError(
            f"out of memory. {first}".strip(),
            "lower train.batch_tokens, train.sae.expansion or num_latents, embed.batch_tokens or shuffle.memory, or take "
            "more GPUs",
        )
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    torch = sys.modules.get("torch")
    on_a_gpu = torch is not None and isinstance(error, torch.OutOfMemoryError)
    # Torch has a class of its own for GPUs alone.
    return isinstance(error, MemoryError) or on_a_gpu or (isinstance(error, RuntimeError) and _ON_A_CPU in str(error))
