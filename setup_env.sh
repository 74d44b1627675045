#!/usr/bin/env bash
# Make .venv and install into it: requirements.txt where an NVIDIA GPU answers, else requirements-cpu.txt.
# `make` runs this when a requirements file changes. Safe to interrupt and to repeat: pip keeps what is there.
# PYTHON=/path/to/python chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")"
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1
stop() { echo "setup: $*" >&2; exit 1; }

if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    base=
    candidates=${PYTHON:-python3 python3.14 python3.13 python3.12 python3.11}
    for candidate in $candidates; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
            base=$candidate
            break
        fi
    done
    [ -n "$base" ] || stop "needs Python 3.11 to 3.14, tried: $candidates" \
        "(name another: make PYTHON=/path/to/python3.11 setup)"
    "$base" -m venv --clear .venv || stop "$base has no venv (Debian, Ubuntu: apt install python3-venv)"
fi
python=.venv/bin/python

if nvidia-smi -L >/dev/null 2>&1; then
    echo "setup: NVIDIA GPU found, installing requirements.txt"
    $python -m pip install -r requirements.txt
else
    echo "setup: no NVIDIA GPU found, installing requirements-cpu.txt (about 3 GB, a few minutes)"
    # torch and torchvision first and alone, because only they come from PyTorch's CPU index. Where that
    # host cannot be reached, pip then waits for it for these two only, not for each of 150 packages, and
    # takes them from wherever else it is told to look. "+cpu" in the pin makes it stop rather than fetch
    # the CUDA build.
    grep -oE '^torch(vision)?==[^ ]+' requirements-cpu.txt | xargs $python -m pip install --no-deps \
        --retries 1 --timeout 15 --extra-index-url https://download.pytorch.org/whl/cpu ||
        stop "torch's CPU build comes from https://download.pytorch.org/whl/cpu: can this machine reach it?"
    $python -m pip install -r requirements-cpu.txt
    # vLLM asks for these and nothing here uses them: PyPI's torchaudio and torchcodec are CUDA builds
    # (torchaudio's breaks the import of transformers beside a CPU torch), triton takes 1 GB and serves GPUs
    # only. All that remains is that `pip check` calls the three missing.
    $python -m pip uninstall --yes --quiet torchaudio torchcodec triton

    # PyPI has torchvision for CUDA only. Beside a CPU torch its library does not load, and its import then
    # dies on "operator torchvision::nms does not exist". Declaring the two operators it misses cures that.
    # A .pth file does so in every process of .venv, vLLM's workers too; it costs nothing until torchvision
    # is imported and does nothing where torchvision has its operators.
    site=$($python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo 'import torchvision_on_cpu' > "$site/torchvision_on_cpu.pth"
    cat > "$site/torchvision_on_cpu.py" <<'PY'
"""Written by setup_env.sh: declares the operators that torchvision's CUDA wheel misses beside a CPU torch."""
import sys


class DeclareMissing:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name == "torchvision._meta_registrations":  # torchvision.extension has tried the library by now
            sys.meta_path.remove(cls)
            if not sys.modules["torchvision.extension"]._has_ops():
                import torch
                for operator in "nms", "qnms":
                    signature = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                    torch.library.define(f"torchvision::{operator}", signature)
        return None  # the import itself goes its usual way


sys.meta_path.insert(0, DeclareMissing)
PY
fi

echo "setup: checking the imports"
$python -c 'import torch, torchvision, vllm; from transformers import Qwen2_5_VLProcessor' >/dev/null ||
    stop "the packages do not import (above); start afresh with: make clean-venv setup"
touch .venv/.ready
echo "setup: done"
