#!/usr/bin/env bash
# Runs the queue: every YAML at the top of experiments/, in name order. Options go to `plmsae run` (see `plmsae run --help`).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
./setup.sh
exec .venv/bin/plmsae run experiments "$@"
