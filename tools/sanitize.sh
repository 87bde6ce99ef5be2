#!/usr/bin/env bash
# Builds the CPU library with AddressSanitizer and UndefinedBehaviorSanitizer in a folder of its own
# and runs the native tests on it once. PYTHON: the interpreter; TESTS: which tests.
set -euo pipefail
python=${PYTHON:-.venv/bin/python}
dir=build/sanitize
echo "==> building with sanitizers ($dir)"
EMBATTLE_CUDA=OFF KEEP_OUT_OF_TREE=1 PYTHON=$python bash tools/build.sh "$dir" -DEMBATTLE_SANITIZE=ON
rm -rf "$dir/python"
mkdir -p "$dir/python"
cp -r python/embattle "$dir/python/"
rm -f "$dir"/python/embattle/_C*.so
cp "$dir"/_C*.so "$dir/python/embattle/"
echo "==> native tests under ASan and UBSan"
# Leaks are not looked for: the interpreter and torch keep what they allocate until they exit.
# shellcheck disable=SC2086
ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
  LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libubsan.so)" \
  PYTHONPATH="$dir/python" OMP_NUM_THREADS=2 \
  "$python" -m pytest -q -p no:cacheprovider ${TESTS:-tests/test_ops_numerics.py tests/test_ops_errors.py}
