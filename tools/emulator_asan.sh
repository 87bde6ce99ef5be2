#!/usr/bin/env bash
# Runs every test of the CUDA kernels in the emulator under AddressSanitizer and UBSan, as two processes.
# PYTHON: the interpreter.
set -euo pipefail
# Leaks are not looked for: the interpreter and torch keep what they allocate until they exit. Python's
# output is not captured: a report has to be seen where the process ends with it.
export EMBATTLE_EMULATOR=asan OMP_NUM_THREADS=1 PYTHONPATH=$PWD/python
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
(cd tests && "$python" -c "import emulated_case; emulated_case.emulated.compiled()")
runtimes="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libubsan.so)"
check() { LD_PRELOAD=$runtimes "$python" -m pytest -q -s -p no:cacheprovider "$@"; }
check tests/test_cuda_kernels.py &
status=0
check tests/test_cuda_group.py tests/test_cuda_sample.py || status=1
wait $! || status=1
exit $status
