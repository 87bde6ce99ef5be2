// Prints the SIMD level that the library would choose on this machine, for EMBATTLE_SIMD_LEVELS=native.
#include <cstdio>

#include "../csrc/cpu/level_here.h"

int main() { std::printf("v%d", embattle::level_here()); }
