"""Dictionaries of other projects: read as ours, and ours written for SAELens."""

from plmsae_cli.runtime.dictionaries.reading import Foreign, read_dictionary
from plmsae_cli.runtime.dictionaries.saelens_writing import write_saelens

__all__ = ["Foreign", "read_dictionary", "write_saelens"]
