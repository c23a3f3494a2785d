#!/usr/bin/env bash
# Everything that needs a GPU, in one run of some minutes on one card: prints a table, writes gpu_smoke.json.
# Installs nothing: a part whose package is missing is skipped, by name. Arguments go to rlattn.bench.gpu:
#   bash launch/gpu_smoke.sh                    all parts
#   bash launch/gpu_smoke.sh triton bench       some
#   bash launch/gpu_smoke.sh --device cpu --small
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PY=python3
if [ -x "$ROOT/.venv/bin/python" ]; then PY=$ROOT/.venv/bin/python; fi
if [ -n "${VIRTUAL_ENV:-}" ]; then PY=$VIRTUAL_ENV/bin/python; fi
"$PY" -c 'import sys; from importlib.util import find_spec; sys.exit(not find_spec("torch"))' || {
  echo "gpu_smoke: $PY has no torch. Install rlattn first (. launch/install.sh), or set VIRTUAL_ENV to where torch is." >&2
  exit 2
}
PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} exec "$PY" -m rlattn.bench.gpu "$@"
