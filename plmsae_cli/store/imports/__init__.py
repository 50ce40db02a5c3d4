"""Activations that another program has computed, read where they lie: InterPLM's, SAELens's, `.npy`, `.safetensors`."""

from __future__ import annotations

from plmsae_cli.store.imports.documents import documents_of, scan_imported, write_documents
from plmsae_cli.store.imports.source import Source, open_source

__all__ = ["Source", "documents_of", "open_source", "scan_imported", "write_documents"]
