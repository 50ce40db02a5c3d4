"""`--bugfix`: the same experiment cut to a smoke run of seconds, with nothing remote and nothing large.

What is kept is the shape: which stages run, the architecture, the policies, the number of layers, the axes.
"""

from __future__ import annotations

from plmsae_cli.config.bugfix.cut import bugfix

__all__ = ["bugfix"]
