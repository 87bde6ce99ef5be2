#!/usr/bin/env bash
# Builds the CPU library with AddressSanitizer and UndefinedBehaviorSanitizer in a folder of its own
# and runs native tests on it once: every wrong argument, every op for several numbers of threads, and
# the samples whose shapes, layouts and options reach every loop. PYTHON: the interpreter; TESTS and
# SELECT: which tests instead ("SELECT=" for all of them).
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
dir=build/sanitize
select="test_ops_errors or threads or what_the_reference_says and"
select+=" (plain or budget or top or box-tensor or nonfinite or mixed or odd or bag or many or columns)"
echo "==> building with sanitizers ($dir)"
# One SIMD level, the highest of v2 and v3 that runs here: the loops of all are the same source.
level=v2
if grep -qw avx2 /proc/cpuinfo; then level=v3; fi
EMBATTLE_CUDA=OFF KEEP_OUT_OF_TREE=1 PYTHON=$python bash tools/build.sh "$dir" -DEMBATTLE_SANITIZE=ON -DEMBATTLE_SIMD_LEVELS=$level
rm -rf "$dir/python"
mkdir -p "$dir/python"
cp -r python/embattle "$dir/python/"
rm -f "$dir"/python/embattle/_C*.so
cp "$dir"/_C*.so "$dir/python/embattle/"
echo "==> native tests under ASan and UBSan"
# Output is not captured: a report has to be seen where a worker ends with it.
# shellcheck disable=SC2086
PYTHONPATH="$dir/python" OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive bash tools/under_asan.sh \
  "$python" -m pytest -q -s -n "${JOBS:-2}" -p no:cacheprovider -k "${SELECT-$select}" \
  ${TESTS:-tests/test_ops_errors.py tests/test_ops_properties.py tests/test_ops_numerics.py \
  tests/test_ops_grad_rows.py}
