#!/bin/sh
# install.sh PYTHON VENV: makes the virtual environment VENV with this project, its tools and pinned versions.
# torch comes first and by itself: with a GPU the one that is there (2.11 or newer) or else the default build,
# without a GPU a CPU build and nothing of CUDA.
set -eu
python=$1
venv=$2

command -v "$python" >/dev/null || { echo "There is no '$python'; name a Python 3.11 to 3.13: make PYTHON=python3.12 ..." >&2; exit 1; }
"$python" - <<'CHECK' || exit 1
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    sys.exit(f"Python 3.11 to 3.13 is needed, this is {sys.version.split()[0]}; name another one: make PYTHON=python3.12 ...")
CHECK

has_gpu() { command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; }
has_torch() { "$1" -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))' 2>/dev/null; }

if has_gpu && has_torch "$python"; then
    "$python" -m venv --system-site-packages "$venv"
else
    "$python" -m venv "$venv"
fi
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@"; }

if has_torch "$venv/bin/python"; then
    echo "torch: the one that is there"
elif has_gpu; then
    pip install --quiet 'torch>=2.11'
else
    # A version with the label +cpu can only be a CPU build. Where no index at hand has that label, PyTorch's own does.
    pip install --quiet 'torch==2.13.0+cpu' 2>/dev/null ||
        pip install --quiet 'torch==2.13.0' --index-url https://download.pytorch.org/whl/cpu
fi
pip install --quiet --constraint constraints.txt --editable '.[dev]'
"$venv/bin/python" -c 'import torch; print("ready: torch", torch.__version__, "on", "a GPU" if torch.cuda.is_available() else "the CPU")'
