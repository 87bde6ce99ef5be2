#!/usr/bin/env bash
# Runs the tests of the CUDA kernels in the emulator under AddressSanitizer and UBSan. PYTHON: the
# interpreter. SHORT=1, as in CI: without tests/test_cuda_kernels.py, whose thousands of samples run
# in the emulator's own build there, as do the orders of threads that are left out here; what is
# left reaches every kernel and path.
set -euo pipefail
export EMBATTLE_EMULATOR=asan OMP_NUM_THREADS=1 PYTHONPATH=$PWD/python
python=$(realpath -s "${PYTHON:-.venv/bin/python}")
(cd tests && "$python" -c "import emulated_case; emulated_case.emulated.compiled()")
# Output is not captured: a report has to be seen where the process ends with it.
check() { bash tools/under_asan.sh "$python" -m pytest -q -s -p no:cacheprovider "${chosen[@]}" "$@"; }
chosen=()
if [ -n "${SHORT:-}" ]; then chosen=(-k "not reverse0 and not random1"); fi
status=0
check tests/test_cuda_group.py &
[ -n "${SHORT:-}" ] || check tests/test_cuda_kernels.py || status=1
check tests/test_cuda_sample.py || status=1
wait $! || status=1
exit $status
