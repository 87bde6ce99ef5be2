#!/bin/sh
# keep_ptxas_report.sh COMPILER ARGS...: runs the compiler. What ptxas -v says goes to OBJECT.ptxas,
# which tools/check_cuda_kernels.py reads; all else goes to standard error.
object=
previous=
for argument; do
  [ "$previous" = -o ] && object=$argument
  previous=$argument
done
[ -n "$object" ] || exec "$@"
said=$object.stderr
"$@" 2>"$said"
status=$?
ptxas='^ptxas info |^    [0-9]+ bytes stack frame'
grep -E "$ptxas" "$said" >"$object.ptxas"
grep -Ev "$ptxas" "$said" >&2
rm -f "$said"
exit $status
