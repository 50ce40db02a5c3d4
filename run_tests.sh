#!/usr/bin/env bash
# Lint, types, architecture and tests. Options go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
./setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
exec .venv/bin/python -m pytest -q -m "not slow and not gpu" "$@"
