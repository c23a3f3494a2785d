#!/usr/bin/env bash
# Trains on all GPUs of one machine, or of several: there, the same line on every one.
# Usage: bash launch/torchrun.sh RECIPE [KEY=VALUE]... [--dry-run]
#   NPROC_PER_NODE   ranks on this machine (default: its GPUs; 1 without any)
#   NNODES           machines (default 1); with more than one also, alike on all of them:
#   MASTER_ADDR      a name or address of the first machine that the others reach
#   MASTER_PORT      a free port on it (default 29500)
#   NODE_RANK        this machine: 0 on the first, then 1, 2, …
#   MAX_RESTARTS     how often ranks that fail are started anew, from the last checkpoint (default 0): all of them, on
#                    all machines; a mistake in the recipe fails every time
#   STOP_SECONDS     what SIGTERM, SIGUSR1 or Ctrl-C leave the ranks to finish a step and save (default 300; torchrun's
#                    own is 30); more than resume.grace_seconds, or a rank that hangs is killed without its message
# All machines must see the same run folder. Exit code: 0, else torchrun's own; how the ranks ended is in its last lines.
set -euo pipefail
usage() { sed -n '2,/^set/{/^set/d; s/^# \{0,1\}//p}' "$0"; }
case ${1:-} in "") usage >&2; exit 2 ;; -h | --help) usage; exit 0 ;; esac
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
PY=python3
if [ -x "$ROOT/.venv/bin/python" ]; then PY=$ROOT/.venv/bin/python; fi
if [ -n "${VIRTUAL_ENV:-}" ]; then PY=$VIRTUAL_ENV/bin/python; fi
: "${NPROC_PER_NODE:=$("$PY" -c 'import torch; print(max(1, torch.cuda.device_count()))')}"

# Without SIGINT here, Ctrl-C makes torchrun send its ranks SIGTERM: they save.
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGHUP,SIGQUIT,SIGUSR1 TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${STOP_SECONDS:-300}
if [ "${NNODES:-1}" -gt 1 ]; then
  where=(--nnodes="$NNODES" --node-rank="${NODE_RANK:?this machine: 0 on the first, then 1, 2, …}"
    --master-addr="${MASTER_ADDR:?a name or address of the first machine}" --master-port="${MASTER_PORT:-29500}")
else
  where=(--standalone)
fi
PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} exec "$PY" -m torch.distributed.run "${where[@]}" \
  --nproc-per-node="$NPROC_PER_NODE" --max-restarts="${MAX_RESTARTS:-0}" -m rlattn.train "$@"
