// Which x86-64 level a processor and its operating system have: every feature that a compiler may
// use under -march=x86-64-vN is asked for, as one that is missing is an illegal instruction.
#pragma once

#include <cstdint>

namespace embattle {

// A feature by the name of the compiler's macro for it, and its bit in what CPUID answers.
struct Feature {
  const char* name;
  int level;  // the lowest that has it
  uint32_t leaf;
  int answer;  // 0 to 3: eax, ebx, ecx, edx
  int bit;
};

constexpr Feature kFeatures[] = {
    {"SSE3", 2, 1, 2, 0},
    {"SSSE3", 2, 1, 2, 9},
    {"GCC_HAVE_SYNC_COMPARE_AND_SWAP_16", 2, 1, 2, 13},
    {"SSE4_1", 2, 1, 2, 19},
    {"SSE4_2", 2, 1, 2, 20},
    {"CRC32", 2, 1, 2, 20},
    {"POPCNT", 2, 1, 2, 23},
    {"LAHF_SAHF", 2, 0x80000001u, 2, 0},
    {"FMA", 3, 1, 2, 12},
    {"MOVBE", 3, 1, 2, 22},
    {"XSAVE", 3, 1, 2, 26},
    {"OSXSAVE", 3, 1, 2, 27},  // no macro: that the system lets programs use it
    {"AVX", 3, 1, 2, 28},
    {"F16C", 3, 1, 2, 29},
    {"BMI", 3, 7, 1, 3},
    {"AVX2", 3, 7, 1, 5},
    {"BMI2", 3, 7, 1, 8},
    {"LZCNT", 3, 0x80000001u, 2, 5},
    {"AVX512F", 4, 7, 1, 16},
    {"AVX512DQ", 4, 7, 1, 17},
    {"AVX512CD", 4, 7, 1, 28},
    {"AVX512BW", 4, 7, 1, 30},
    {"AVX512VL", 4, 7, 1, 31},
};

// What the system saves of the registers at a switch of threads, by level: bits of XCR0.
constexpr uint64_t kSaved[] = {0, 0, 0, 0x6, 0xe6};

// The highest level, 1 (the baseline) to 4.
//
// cpuid(leaf, answers): CPUID with subleaf 0 into four words; false for a leaf that there is not.
// xcr0(): what XGETBV answers for 0; called only where OSXSAVE is set.
template <class Cpuid, class Xcr0>
int highest_level(const Cpuid& cpuid, const Xcr0& xcr0) {
  const auto has = [&](const Feature& f) {
    uint32_t answers[4] = {};
    return cpuid(f.leaf, answers) && (answers[f.answer] >> f.bit & 1);
  };
  int level = 1;
  for (int next = 2; next <= 4; ++next, ++level) {
    for (const Feature& f : kFeatures)
      if (f.level == next && !has(f)) return level;
    if (kSaved[next] && (xcr0() & kSaved[next]) != kSaved[next]) return level;
  }
  return level;
}

}  // namespace embattle
