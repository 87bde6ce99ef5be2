// Included by the kernel files that are compiled once per SIMD level (EMBATTLE_LEVEL = v2, v3, v4).
//
// Precondition for every such file: no function with external linkage but the kernels themselves,
// and none of std::'s inline functions that the compiler may leave out of line. Two levels' copies
// of one inline function would be merged by the linker, and the wrong one can hold instructions
// that the processor lacks. Everything lives in an anonymous namespace; tests/test_build.py looks
// at the objects' symbols.
#pragma once

#include "../launch.h"

#define EMBATTLE_JOIN_(a, b) a##b
#define EMBATTLE_JOIN(a, b) EMBATTLE_JOIN_(a, b)
#define EMBATTLE_AT_LEVEL(name) EMBATTLE_JOIN(name##_, EMBATTLE_LEVEL)
#define EMBATTLE_QUOTE_(a) #a
#define EMBATTLE_QUOTE(a) EMBATTLE_QUOTE_(a)

namespace embattle {
namespace {

inline int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}

}  // namespace
}  // namespace embattle
