#!/usr/bin/env bash
# From a fresh machine to a finished run: installs rlattn, trains a tiny reasoner on the CPU, writes a report.
# Arguments are overrides of the recipe: bash launch/quickstart.sh trainer.max_steps=20
# shellcheck source=launch/install.sh
. "$(dirname "$0")/install.sh" ""
exec "$PY" -m rlattn.cli train recipes/quickstart.yaml "$@"
