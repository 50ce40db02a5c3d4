#!/usr/bin/env bash
# Runs the queue: every YAML at the top of experiments/, in name order. Options go to `plmsae run` (see `plmsae run --help`).
# On a fresh box it first makes the environment. It asks for the W&B key if a YAML wants it and it is absent,
# on a terminal only, without echo; `plmsae export --push` asks for the Hugging Face token, since no experiment wants one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
for argument in "$@"; do
  case "${argument%%=*}" in # answered before minutes of setup; never repeated, since it may hold a secret
    --token | --wandb_token) echo "error: there is no option ${argument%%=*}
hint: secrets are not arguments: set HF_TOKEN or WANDB_API_KEY, or log in with \`hf auth login\`, \`wandb login\`" >&2; exit 2 ;;
    --yaml_path) echo "error: there is no option --yaml_path
hint: drop the file into experiments/, or run it alone: .venv/bin/plmsae run my.yaml" >&2; exit 2 ;;
  esac
done
./setup.sh
exec .venv/bin/plmsae run experiments "$@"
