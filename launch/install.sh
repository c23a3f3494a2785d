# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: a virtual environment with rlattn in it. Sets $PY.
#   VIRTUAL_ENV  an active environment is reused; otherwise .venv is made (or reused) beside the project
#   TORCH        what to install where no torch can be imported (default: the tested version)
# Usage: . launch/install.sh EXTRAS

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
EXTRAS=${1:-}
TORCH=${TORCH:-torch==2.13.0}

python_of() { for name in python3 python3.13 python3.12 python3.11; do
  if command -v "$name" >/dev/null && "$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then echo "$name"; return; fi
done; echo "rlattn needs python 3.11 or newer; found $(python3 --version 2>&1 || echo none)." >&2; return 2; }

if [ -n "${VIRTUAL_ENV:-}" ]; then
  PY=$VIRTUAL_ENV/bin/python
else
  BASE=$(python_of)
  if [ ! -x .venv/bin/python ]; then
    echo "making a virtual environment in .venv"
    # a torch that is there already, with its CUDA build, is kept: the environment sees it
    if "$BASE" -c 'import torch' 2>/dev/null; then "$BASE" -m venv --system-site-packages .venv; else "$BASE" -m venv .venv; fi
  fi
  PY=$PWD/.venv/bin/python
fi

PIP=("$PY" -m pip install --quiet --disable-pip-version-check)
if ! "$PY" -c 'import torch' 2>/dev/null; then
  if command -v nvidia-smi >/dev/null && nvidia-smi >/dev/null 2>&1; then
    echo "installing $TORCH for the GPU that nvidia-smi shows"
    "${PIP[@]}" "$TORCH"
  else
    echo "installing $TORCH for the CPU"
    # plain wheels for Linux carry gigabytes of CUDA: ask for the CPU build, and take any build where there is none
    "${PIP[@]}" "$TORCH+cpu" 2>/dev/null ||
      "${PIP[@]}" "$TORCH" --index-url https://download.pytorch.org/whl/cpu 2>/dev/null ||
      "${PIP[@]}" "$TORCH"
  fi
fi
echo "installing rlattn${EXTRAS:+[$EXTRAS]}"
# torch is not constrained, nor the triton that came with it: what is there stays
THERE=torch; "$PY" -c 'import triton' 2>/dev/null && THERE='torch\|triton'
"${PIP[@]}" -c <(grep -v "^\($THERE\)==" launch/constraints.txt) -e ".${EXTRAS:+[$EXTRAS]}"
