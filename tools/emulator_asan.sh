#!/usr/bin/env bash
# Runs the tests of the CUDA kernels in the emulator under AddressSanitizer and UBSan. PYTHON: the
# interpreter. SHORT=1, as in CI: without tests/test_cuda_kernels.py, whose thousands of samples run
# in the emulator's own build there; the other two reach every kernel and path in four orders.
set -euo pipefail
# Leaks are not looked for: the interpreter and torch keep what they allocate until they exit. Python's
# output is not captured: a report has to be seen where the process ends with it.
export EMBATTLE_EMULATOR=asan OMP_NUM_THREADS=1 PYTHONPATH=$PWD/python
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
(cd tests && "$python" -c "import emulated_case; emulated_case.emulated.compiled()")
runtimes="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libubsan.so)"
check() { LD_PRELOAD=$runtimes "$python" -m pytest -q -s -p no:cacheprovider "$@"; }
status=0
check tests/test_cuda_group.py &
[ -n "${SHORT:-}" ] || check tests/test_cuda_kernels.py || status=1
check tests/test_cuda_sample.py || status=1
wait $! || status=1
exit $status
