"""plmsae: from proteins to interpretable features.

The notebook face; nothing is imported before it is used.

    from plmsae_cli import load_plm, load_sae, open_blocks
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from plmsae_cli.runtime.models import load_plm
    from plmsae_cli.runtime.saved import load_sae, open_blocks

__all__ = ["load_plm", "load_sae", "open_blocks"]
__version__ = "0.1.0"

_HOMES = {
    "load_plm": "plmsae_cli.runtime.models",
    "load_sae": "plmsae_cli.runtime.saved",
    "open_blocks": "plmsae_cli.runtime.saved",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'plmsae_cli' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
