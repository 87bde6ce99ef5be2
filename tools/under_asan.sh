#!/usr/bin/env bash
# Runs a command of Python, whose extension modules were compiled with AddressSanitizer and UBSan:
# under_asan.sh COMMAND. Leaks are not looked for: the interpreter and torch keep what they allocate
# until they exit.
set -euo pipefail
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1
LD_PRELOAD="$(${CXX:-g++} -print-file-name=libasan.so) $(${CXX:-g++} -print-file-name=libubsan.so)"
export LD_PRELOAD
exec "$@"
