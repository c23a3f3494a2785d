#!/usr/bin/env bash
# Installs rlattn with what its tests need, and runs them. Arguments go to pytest: bash launch/test.sh -k recipe
#   TEST_PROCESSES  how many run at once (default 3, which keep two cores busy; a gigabyte or two each)
#   --fast  (first)  leaves out the tests that take long: the set for everyday work
# shellcheck source=launch/install.sh
. "$(dirname "$0")/install.sh" "dev"
if [ "${1:-}" = --fast ]; then
  shift
  set -- -m "not slow" "$@"
fi
exec "$PY" -m pytest -n "${TEST_PROCESSES:-3}" --dist worksteal "$@"
