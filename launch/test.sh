#!/usr/bin/env bash
# Installs rlattn with what its tests need, and runs them. Arguments go to pytest: bash launch/test.sh -k recipe
# shellcheck source=launch/install.sh
. "$(dirname "$0")/install.sh" "dev"
exec "$PY" -m pytest -n "${TEST_PROCESSES:-2}" --dist worksteal "$@"
