#!/usr/bin/env bash
# Runs the tests of RecBole's models with RecBole, which needs numpy < 2: the same binary, in an
# environment of its own (.venv-recbole). Usage: recbole.sh [pytest options]
# PYTHON: the interpreter that the library was built for. TORCH: a pip requirement.
set -euo pipefail
venv=.venv-recbole
torch=${TORCH:?}
python=${PYTHON:-python3}
stamp=$venv/.ready
made_for="$("$python" -c 'import sys; print(sys.base_prefix, *sys.version_info[:2])') $torch"
wanted="$made_for $(cksum <pyproject.toml)"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  rm -rf "$venv"
  echo "==> virtual environment in $venv ($torch, RecBole)"
  "$python" -m venv "$venv"
  requirements=()
  while IFS= read -r line; do requirements+=("$line"); done \
    < <("$python" tools/requirements.py jobs recbole)
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
    "$torch" "${requirements[@]}" pytest
  echo "$wanted" >"$stamp"
fi
OMP_NUM_THREADS=1 PYTHONPATH=python exec "$venv/bin/python" -m pytest -q "$@" tests/test_recbole.py
