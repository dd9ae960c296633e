#!/usr/bin/env bash
# Everything to measure on one GPU: benchmarks/gpu.sh OUT quick|full [REFERENCE]   (see gpu.py)
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/gpu.py" "$@"
