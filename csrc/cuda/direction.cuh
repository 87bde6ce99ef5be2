// The direction of steepest ascent of a group.
#pragma once

#include "../formulas.h"
#include "chunks.cuh"

namespace embattle::cuda {

template <class A>
using Bits = std::conditional_t<sizeof(A) == 4, unsigned, unsigned long long>;

// The steepest ascent direction of a group, as numbers that give each element's part.
template <class A>
struct Direction {
  bool moving = false;
  A scale = 1;  // power of two that brings the gradient into range
  A factor = 0;
  // l1: elements with larger bits move, and of those with these bits the thread's first `ties`.
  Bits<A> key = 0;
  int ties = 0;
};

template <class A>
__device__ __forceinline__ Bits<A> bits_of(A x) {
  if constexpr (sizeof(A) == 4)
    return __float_as_uint(x);
  else
    return Bits<A>(__double_as_longlong(x));
}

// A power of two that brings magnitudes up to `largest` to where A neither overflows nor loses
// bits.
template <class A>
__device__ __forceinline__ A range_scale(double largest) {
  if constexpr (sizeof(A) == 4)
    return largest < 0x1p-60 ? 0x1p100f : largest > 0x1p60 ? 0x1p-100f : 1.f;
  else
    return largest < 0x1p-400 ? 0x1p600 : largest > 0x1p400 ? 0x1p-600 : 1.0;
}

template <class T, bool kFull>
class Steepest : public Chunks<T, kFull> {
  using Base = Chunks<T, kFull>;

 public:
  using Base::Base, Base::kElements, Base::each;
  using typename Base::A, typename Base::Chunk;

  // How a gradient's magnitudes go into a maximum: non-finite ones as infinity.
  __device__ __forceinline__ static A extent(A g) {
    return is_finite(g) ? magnitude(g) : A(kInfinity);
  }

  // The direction of steepest ascent of what source(k, chunk, valid, values) gives. Sets `finite`
  // to whether all of it is finite; where not, nothing moves.
  //
  // All passes over the group are rounds of one loop, so that `source` is compiled once.
  template <Norm kNorm, class Source>
  __device__ __forceinline__ Direction<A> direction(Source source, double step, bool* finite) {
    Direction<A> u;
    [[maybe_unused]] int top = 0;  // of this thread's elements: the first of the largest
    [[maybe_unused]] Choice choice;
#pragma unroll 1
    for (bool again = false;; again = true) {  // the first round measures; others are rare
      Sums s;
      A most = 0;
      each([&](int k, int64_t c, unsigned valid) {
        Chunk g;
        source(k, c, valid, g);
        if (kNorm == Norm::l1 && again) return count(choice, k, valid, g, s);
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          if constexpr (kNorm == Norm::l1)
            if (extent(g[i]) > most) top = k * kElements + i;
          most = larger(most, extent(g[i]));
          if constexpr (kNorm == Norm::l2) s.a += double(g[i] * u.scale) * double(g[i] * u.scale);
        }
      });
      if (kNorm == Norm::l1 && again) {
        if (!next(choice, team_.agree(kSumA | kSumB, s))) {
          u.key = choice.key;
          u.ties = up_to(choice.low);
          u.factor = A(step / choice.wanted);
          return u;
        }
        continue;
      }
      s.m = double(most);
      s = team_.agree(kNorm == Norm::l2 ? kSumA | kMax : kMax, s);
      if (!again) {
        *finite = s.m < kInfinity;
        if (!*finite || s.m == 0) return u;
        u.moving = true;
      }
      if constexpr (kNorm == Norm::linf) {
        u.factor = A(step);
        return u;
      } else if constexpr (kNorm == Norm::l2) {
        double length = sqrt(s.a);
        if (!again) {
          u.scale = range_scale<A>(s.m);
          if (sizeof(A) == 8 && u.scale != 1) continue;  // the squares may have left the range
          length *= double(u.scale);
        }
        constexpr double kMost = sizeof(A) == 4 ? 3e38 : 1.7e308;
        u.factor = A(larger(smaller(step / length, kMost), -kMost));
        return u;
      } else {
        // The first of all is the answer for one coordinate.
        u.key = bits_of(A(s.m));
        const int64_t last =
            int64_t(-team_.max(double(most) == s.m ? -double(element_of(top)) : -kInfinity));
        u.ties = up_to(last);
        u.factor = A(step);
        if (p_.rule.top == 1) return u;
        choice.largest = u.key;
        choice.low = begin_;
        choice.high = end_ - 1;
      }
    }
  }

  // v moved by an element's part of the direction. `place`: the element's number in the thread.
  template <Norm kNorm>
  __device__ __forceinline__ static A moved(const Direction<A>& u, A v, A g, int place) {
    if constexpr (kNorm == Norm::l2) {
      return fused(u.factor, g * u.scale, v);
    } else if constexpr (kNorm == Norm::linf) {
      return g > 0 ? v + u.factor : g < 0 ? v - u.factor : v;
    } else {
      const Bits<A> key = bits_of(magnitude(g));
      const bool moves = key > u.key || (key == u.key && place < u.ties);
      return !moves ? v : g > 0 ? v + u.factor : g < 0 ? v - u.factor : v;
    }
  }

 private:
  // l1: which `top` coordinates of the gradient move. Chosen are the elements with larger bits than
  // `key`, and those with these bits up to `low`. Which they are is found by counting: first key,
  // bit by bit from the top; then the last element, by bisection.
  struct Choice {
    Bits<A> largest = 0;  // of all
    Bits<A> key = 0;
    Bits<A> than = 0;  // the next pass counts elements with larger bits, and of those with
    int ties = 0;      // these bits the thread's first `ties`
    int bit = int(sizeof(A)) * 8 - 2;
    int64_t low = 0, high = 0;  // elements of the tensor, the last one chosen between them
    double wanted = -1;         // how many; known after the first count, which is of what is not
                                // zero, and of all
  };

  __device__ __forceinline__ static void count(const Choice& choice, int k, unsigned valid,
                                               const Chunk& g, Sums& s) {
    s.b += __popc(valid);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const Bits<A> bits = bits_of(magnitude(g[i]));
      s.a += valid >> i & 1 &&
             (bits > choice.than || (bits == choice.than && k * kElements + i < choice.ties));
    }
  }

  // Takes a count; false: the choice is made.
  __device__ __forceinline__ bool next(Choice& choice, const Sums& s) const {
    const auto candidate = [&] { return choice.key | Bits<A>(1) << choice.bit; };
    if (choice.wanted < 0) {
      choice.wanted = smaller(double(top_count(p_.rule.top, int64_t(s.b))), s.a);
    } else if (choice.bit >= 0) {
      if (s.a >= choice.wanted) choice.key = candidate();
      --choice.bit;
    } else if (s.a >= choice.wanted) {
      choice.high = last_counted(choice);
    } else {
      choice.low = last_counted(choice) + 1;
    }
    while (choice.bit >= 0 && candidate() > choice.largest) --choice.bit;
    choice.than = choice.key;
    choice.ties = 0;
    if (choice.bit >= 0) {
      choice.than = candidate() - 1;
      return true;
    }
    choice.ties = up_to(last_counted(choice));
    return choice.low != choice.high;
  }
  __device__ __forceinline__ static int64_t last_counted(const Choice& choice) {
    return choice.low + (choice.high - choice.low) / 2;
  }

 protected:
  using Base::p_, Base::team_;

 private:
  using Base::element_of, Base::up_to, Base::begin_, Base::end_;
};

}  // namespace embattle::cuda
