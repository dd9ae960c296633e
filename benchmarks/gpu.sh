#!/usr/bin/env bash
# Checks and measurements on one GPU: benchmarks/gpu.sh OUT quick|full [REFERENCE]   (see gpu.py)
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu.py" "$@"
