#!/usr/bin/env bash
# What only a GPU shows. Run it again and again: each call works for at most about nine minutes and goes on where the
# last one stopped, until it says that nothing is left. The arguments are those of gpu_check.py, see its --help.
set -euo pipefail
exec python "$(dirname "${BASH_SOURCE[0]}")/gpu_check.py" "$@"
