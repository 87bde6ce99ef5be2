#!/usr/bin/env bash
# Builds the native module into a folder and copies it into the package. Usage: build.sh DIR [cmake options]
# PYTHON: the interpreter with torch, pybind11 and cmake; JOBS: parallel compilations; CUDAARCHS, as
# for CMake: what the CUDA kernels are compiled for, instead of all that the default names. TARGET:
# that part of it alone. KEEP_OUT_OF_TREE: not copied.
set -euo pipefail
dir=$1
shift
python=${PYTHON:-python3}
python=$(realpath -s "$(command -v "$python")")
tools=$(dirname "$python")
mkdir -p "$dir"
export PATH="$tools:$PATH"
cmake -S . -B "$dir" -G Ninja -DCMAKE_BUILD_TYPE=Release -DEMBATTLE_CUDA="${EMBATTLE_CUDA:-AUTO}" \
  -DPython_EXECUTABLE="$python" -Dpybind11_DIR="$("$python" -m pybind11 --cmakedir)" \
  ${CUDAARCHS:+-DCMAKE_CUDA_ARCHITECTURES="$CUDAARCHS"} "$@" >"$dir/configure.log" 2>&1 \
  || { cat "$dir/configure.log"; exit 1; }
grep -E "^-- (torch|SIMD levels|CUDA kernels)" "$dir/configure.log" || true
cmake --build "$dir" --parallel "${JOBS:-2}" ${TARGET:+--target "$TARGET"}
if [ -z "${KEEP_OUT_OF_TREE:-}" ]; then
  rm -f python/embattle/_C*.so
  cp "$dir"/_C*.so python/embattle/
fi
