#!/usr/bin/env bash
# Makes .venv hold what the Makefile's targets need, and does nothing when it does already.
# PYTHON: the interpreter to make it from; TORCH: a pip requirement.
set -euo pipefail
venv=.venv
stamp=$venv/.ready
python=${PYTHON:-python3}
torch=${TORCH:-torch}

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

wanted="$("$python" -c 'import sys; print(sys.base_prefix, *sys.version_info[:3])') $torch $(cksum <pyproject.toml) $(command -v nvcc || true)"
[ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && exit 0

# Another interpreter or another torch: start over, so that nothing of the old one is left.
if [ -f "$stamp" ] && [ "$(cut -d' ' -f1-5 "$stamp")" != "$(echo "$wanted" | cut -d' ' -f1-5)" ]; then
  echo "==> $venv was made for '$(cut -d' ' -f2-5 "$stamp")': removing it and the build"
  rm -rf "$venv" build/dev python/embattle/_C*.so
fi
rm -f "$stamp"
echo "==> virtual environment in $venv ($("$python" --version 2>&1), $torch)"
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
# Modules are compiled as they are imported: most of those installed never are.
install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile "$@"; }
install "$torch"
echo "==> build tools, test tools and the packages that the jobs use"
requirements=()
while IFS= read -r line; do requirements+=("$line"); done < <("$venv/bin/python" tools/requirements.py)
install "$torch" "${requirements[@]}"
echo "$wanted" >"$stamp"
