#!/usr/bin/env bash
# Makes .venv hold torch and what is needed for some purposes, and does nothing when it does already.
# Usage: setup.sh [PURPOSE...], of build, jobs, test and lint (see requirements.py); all by default.
# PYTHON: the interpreter to make it from; TORCH: a pip requirement.
set -euo pipefail
venv=.venv
python=${PYTHON:-python3}
torch=${TORCH:-torch}
[ $# -gt 0 ] || set -- build jobs test lint

if ! "$python" -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
  echo "embattle needs Python >= 3.10 with the venv module; '$python' is not one." \
       "Choose another with PYTHON=..., or install it (Debian: apt-get install python3-venv)." >&2
  exit 1
fi
if ! command -v "${CXX:-c++}" >/dev/null; then
  echo "embattle needs a C++20 compiler (g++ >= 11 or clang >= 14), and found none." \
       "Install one (Debian: apt-get install g++), or name it with CXX=..." >&2
  exit 1
fi

made_for="$("$python" -c 'import sys; print(sys.base_prefix, *sys.version_info[:3])') $torch"
wanted="$made_for $(cksum <pyproject.toml) $(command -v nvcc || true)"
missing=()
for purpose; do
  [ "$(cat "$venv/.ready-$purpose" 2>/dev/null)" = "$wanted" ] || missing+=("$purpose")
done
[ ${#missing[@]} -gt 0 ] || exit 0

# Another interpreter or another torch: start over, so that nothing of the old one is left.
old=$(cat "$venv/.made-for" 2>/dev/null || true)
if [ -n "$old" ] && [ "$old" != "$made_for" ]; then
  echo "==> $venv was made for '$old': removing it and the build"
  rm -rf "$venv" build/dev python/embattle/_C*.so
fi
if [ ! -f "$venv/.made-for" ]; then
  echo "==> virtual environment in $venv ($("$python" --version 2>&1), $torch)"
  "$python" -m venv "$venv"
  echo "$made_for" >"$venv/.made-for"
fi
echo "==> packages for: ${missing[*]}"
requirements=()
while IFS= read -r line; do requirements+=("$line"); done \
  < <("$venv/bin/python" tools/requirements.py "${missing[@]}")
# One resolution for all. Modules are compiled as they are imported: most of them never are.
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile \
  "$torch" "${requirements[@]}"
for purpose in "${missing[@]}"; do echo "$wanted" >"$venv/.ready-$purpose"; done
