"""Language models as folders that `transformers` loads."""

from plmsae_cli.runtime.hub.export import export_run, push

__all__ = ["export_run", "push"]
