#!/usr/bin/env bash
# Gradescope runs this once, as root, when it builds the image: Debian or Ubuntu, Python 3.10 to 3.13.
# It installs rlhf-course @VERSION@ from the wheel beside it, under the versions that were tested.
#
#   AUTOGRADER=DIR    another place than /autograder
#   PYTHON=COMMAND    a Python of your own
#   TORCH_INDEX=URL   another index for torch, or none; the CPU's has no CUDA libraries
set -euo pipefail
ROOT=${AUTOGRADER:-/autograder}
SOURCE=$ROOT/source
INDEX=${TORCH_INDEX-https://download.pytorch.org/whl/cpu}

fits() {  # a Python of the right version that can make virtual environments
    "$1" -c 'import sys, ensurepip, venv; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 14))' \
        2>/dev/null
}

find_python() {
    local name
    for name in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if fits "$name"; then
            echo "$name"
            return
        fi
    done
    return 1
}

if ! find_python >/dev/null && command -v apt-get >/dev/null; then
    export DEBIAN_FRONTEND=noninteractive
    apt-get update
    apt-get install -y --no-install-recommends python3 python3-venv
fi
if ! python=$(find_python); then
    echo "No Python 3.10 to 3.13 with venv here: choose a newer base image, such as Ubuntu 22.04." >&2
    exit 1
fi

"$python" -m venv --clear "$ROOT/venv"
# Torch first: nothing else is looked for in its index.
install=("$ROOT/venv/bin/python" -m pip install --no-cache-dir -c "$SOURCE/constraints.txt")
"${install[@]}" ${INDEX:+--extra-index-url "$INDEX"} torch
"${install[@]}" "$SOURCE/@WHEEL@"
"$ROOT/venv/bin/python" -c \
    'import torch, rlhf_course; print("rlhf-course", rlhf_course.__version__, "torch", torch.__version__)'

# Players run as another user than root: what holds the answers is for root's eyes only.
chmod -R go-rwx "$SOURCE" "$ROOT"/venv/lib/python3*/site-packages/rlhf_course*
