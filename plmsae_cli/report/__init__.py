"""What a person sees of a run: one self-contained HTML page, and figures for a terminal table."""

from __future__ import annotations

from plmsae_cli.report.build import build_report
from plmsae_cli.report.sweep import build_sweep_report
from plmsae_cli.report.table import summary

__all__ = ["build_report", "build_sweep_report", "summary"]
