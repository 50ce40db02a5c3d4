#!/usr/bin/env bash
# Makes .venv with the pinned versions. Run by run_experiments.sh and run_tests.sh; quick when there is nothing to do.
#   ./setup.sh                      everything, with the torch wheel that the driver can run (none: the small CPU build)
#   ./setup.sh --torch-index URL    torch from another wheel index; `pypi`: the default one of pip
#   ./setup.sh --which-torch        only print the index that would be asked
#   PYTHON=python3.12 ./setup.sh    another interpreter
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $1"; say "hint: $2"; exit 1; }

torch_index="" which=""
while [ $# -gt 0 ]; do
  case "$1" in
    --torch-index) [ $# -ge 2 ] || die "--torch-index needs a URL" "take it from pytorch.org/get-started"; torch_index=$2; shift 2 ;;
    --which-torch) which=yes; shift ;;
    *) die "unknown option $1" "./setup.sh [--torch-index URL] [--which-torch]" ;;
  esac
done

# PyTorch's public index has a build for each CUDA; the newest that this driver can run, by what nvidia-smi says of it.
fitting_index() {
  local wheels=https://download.pytorch.org/whl found version
  [ "$(uname -s)" = Linux ] || { echo pypi; return; } # elsewhere pip's default wheel is the right one
  found=$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: *\([0-9]*\)\.\([0-9]*\).*/\1 \2/p' | head -n 1) || true
  [ -n "$found" ] || { echo "$wheels/cpu"; return; }
  version=$((${found% *} * 10 + ${found#* }))
  if [ "$version" -ge 130 ]; then echo "$wheels/cu130"
  elif [ "$version" -ge 128 ]; then echo "$wheels/cu128"
  elif [ "$version" -ge 126 ]; then echo "$wheels/cu126"
  else die "the driver runs CUDA ${found% *}.${found#* }, and torch here needs 12.6 or newer" \
    "update the NVIDIA driver to 560 or newer, or launch on the CPU: ./setup.sh --torch-index https://download.pytorch.org/whl/cpu"
  fi
}

find_python() {
  local candidate
  for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 python; do
    command -v "$candidate" >/dev/null 2>&1 || continue
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      echo "$candidate"
      return
    fi
  done
  die "no Python 3.11 or newer found" "install one, or name it: PYTHON=/path/to/python ./setup.sh"
}

if [ -n "$which" ]; then
  fitting_index
  exit
fi

stamp=.venv/.plmsae-setup
wanted="$(cat pyproject.toml constraints.txt | cksum) $PWD"
ready() { [ -z "$torch_index" ] && [ -x .venv/bin/plmsae ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; }
if ready; then exit 0; fi

# Two starts at once, in two terminals, would install into each other's .venv: the second waits, and finds it made.
exec 9<.
if command -v flock >/dev/null 2>&1 && flock 9 2>/dev/null && ready; then exit 0; fi

# Killed in the middle it may be a .venv without pip.
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
  python=$(find_python)
  "$python" -c 'import ensurepip, venv' 2>/dev/null ||
    die "$python has no venv module" "on Debian and Ubuntu: apt-get install python3-venv"
  free_kb=$(df -Pk . | awk 'NR == 2 {print $4}')
  [ "$free_kb" -gt 3000000 ] || die "only $((free_kb / 1000)) MB are free here, 3,000 are needed" "free some, or clone to a larger disk"
  say "making .venv with $("$python" --version) (once, some minutes)"
  "$python" -m venv .venv
fi

say "installing the pinned versions"
rm -f "$stamp"
asked=$torch_index
[ -n "$torch_index" ] || torch_index=$(fitting_index)
pinned=$(grep -E '^(torch|torchvision)==' constraints.txt)
# What is installed already is kept unless an index was asked for; torchvision must be of torch's build.
if [ "$torch_index" != pypi ] && { [ -n "$asked" ] || ! .venv/bin/python -c 'import torch' 2>/dev/null; }; then
  # shellcheck disable=SC2086  # two words, each a requirement
  .venv/bin/python -m pip install --quiet --disable-pip-version-check --retries 1 --timeout 20 ${asked:+--force-reinstall} --no-deps --no-warn-conflicts \
    --index-url "$torch_index" $pinned || {
    [ -z "$asked" ] || die "torch cannot be had from $torch_index" "name another index, or: ./setup.sh --torch-index pypi"
    say "$torch_index does not answer: torch comes from pip's own index"
  }
fi
# Build tools are pinned like everything else, so the editable install fetches no second copy of them.
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt setuptools
.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[dev]' ||
  die "the installation failed (see above)" "is the package index reachable, and the disk not full?"

# A CUDA build of torch brings its own triton; beside a CPU build it serves the kernels' tests, in Triton's interpreter.
.venv/bin/python -c 'import triton' 2>/dev/null ||
  .venv/bin/python -m pip install --quiet --disable-pip-version-check triton==3.6.0 ||
  say "no triton for this platform: the tests of the GPU kernels are skipped"

if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then
  command -v "${CC:-gcc}" >/dev/null 2>&1 || command -v clang >/dev/null 2>&1 ||
    say "no C compiler: the kernels on GPUs want one (on Debian and Ubuntu: apt-get install gcc python3-dev)"
  .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    die "nvidia-smi shows a GPU, but this torch cannot use it (driver older than the wheel?)" \
      "./setup.sh --which-torch names the index for this driver; ./setup.sh --torch-index URL installs from it"
fi
printf '%s' "$wanted" >"$stamp"
say "ready: .venv/bin/plmsae"
