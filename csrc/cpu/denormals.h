// Subnormal numbers count, whatever torch.set_flush_denormal says: a float16 number below 2^-14 is
// an ordinary gradient, and one that vanished would be a step of no length. So the kernels run with
// the processor's flushing off, on every thread; it is back to what it was behind them.
#pragma once

#include <cstdint>

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace embattle {

class KeepDenormals {
 public:
  KeepDenormals() : before_(read()) {
    if (before_ & kFlush) write(before_ & ~kFlush);
  }
  ~KeepDenormals() {
    if (before_ & kFlush) write(before_);
  }
  KeepDenormals(const KeepDenormals&) = delete;
  KeepDenormals& operator=(const KeepDenormals&) = delete;

 private:
#if defined(__SSE__)
  using Word = unsigned;
  static constexpr Word kFlush = 0x8040;  // flush to zero, denormals are zero
  static Word read() { return _mm_getcsr(); }
  static void write(Word x) { _mm_setcsr(x); }
#elif defined(__aarch64__)
  using Word = uint64_t;
  static constexpr Word kFlush = uint64_t{1} << 24 | uint64_t{1} << 19;  // FZ, FZ16
  static Word read() {
    Word x;
    asm volatile("mrs %0, fpcr" : "=r"(x)::"memory");
    return x;
  }
  static void write(Word x) { asm volatile("msr fpcr, %0" ::"r"(x) : "memory"); }
#else
  using Word = unsigned;
  static constexpr Word kFlush = 0;
  static Word read() { return 0; }
  static void write(Word) {}
#endif
  Word before_;
};

}  // namespace embattle
