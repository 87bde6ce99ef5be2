#!/usr/bin/env bash
# Runs the tests of ops and attacks under the oldest torch that the native library serves: the same
# binary, in an environment of its own (.venv-min). Usage: torch_min.sh [pytest options]
# PYTHON: the interpreter that the library was built for. JOBS: processes.
# TORCH_MIN: a pip requirement. It asks for a build for the CPU, which pip finds where it is told
# (PIP_FIND_LINKS, PIP_EXTRA_INDEX_URL). What PyPI has for Linux on x86-64 brings 7 GB of CUDA: that
# is taken where there is no other, unless IF_CHEAP=1, which then says so and succeeds.
set -euo pipefail
venv=.venv-min
torch=${TORCH_MIN:?}
python=${PYTHON:-python3}
stamp=$venv/.ready
log=build/torch-min.log
wanted="$("$python" -c 'import sys; print(sys.base_prefix, *sys.version_info[:2])') $torch"
if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
  rm -rf "$venv"
  mkdir -p build
  echo "==> virtual environment in $venv ($torch)"
  "$python" -m venv "$venv"
  install() { "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile "$@"; }
  found=$torch
  if ! install "$torch" >"$log" 2>&1; then
    if ! grep -qE "No matching distribution|ResolutionImpossible" "$log"; then
      cat "$log" >&2
      exit 1
    elif [ -n "${IF_CHEAP:-}" ]; then
      rm -rf "$venv"
      echo "torch-min: pip finds no $torch here: nothing was tested under it (see tools/torch_min.sh)" >&2
      exit 0
    fi
    found=${torch%+cpu}
    echo "==> pip finds no $torch: getting $found with all its CUDA libraries (7 GB on the disk)"
    install "$found"
  fi
  install "$found" numpy hypothesis pytest pytest-xdist transformers
  echo "$wanted" >"$stamp"
fi
# Not what torch.compile makes of it: that is the newest torch's affair, and takes long.
tests=()
for name in attacks autocast criteria early_stopping guard losses objective ops_errors ops_grad_rows \
    ops_numerics ops_torch options perturb replay results sites tokens torchrec; do
  tests+=("tests/test_$name.py")
done
OMP_NUM_THREADS=1 PYTHONPATH=python exec "$venv/bin/python" -m pytest -q -n "${JOBS:-2}" \
  -k "not compile and not export and not opcheck and not gradcheck" "$@" "${tests[@]}"
