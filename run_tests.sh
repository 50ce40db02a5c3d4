#!/usr/bin/env bash
# Lint, types, architecture and tests. Options go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
./setup.sh
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/mypy
# Tests start many processes: threads that wait must not spin on the cores that others need (the command sets this too).
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-PASSIVE}
# A worker a core: more threads of each would take the cores of the others.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# Files stay whole, since their fixtures are dear.
exec .venv/bin/python -m pytest -q -n auto --dist loadfile -m "not slow and not gpu" "$@"
