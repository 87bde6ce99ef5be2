// The direction of steepest ascent of a group.
#pragma once

#include "../formulas.h"
#include "chunks.cuh"

namespace embattle::cuda {

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

// A power of two that brings magnitudes up to `largest` to where A neither overflows nor loses
// bits.
template <class A>
__device__ __forceinline__ A range_scale(double largest) {
  if constexpr (sizeof(A) == 4)
    return largest < 0x1p-60 ? 0x1p100f : largest > 0x1p60 ? 0x1p-100f : 1.f;
  else
    return largest < 0x1p-400 ? 0x1p600 : largest > 0x1p400 ? 0x1p-600 : 1.0;
}

// A choice of `wanted` items: those with the largest keys, and of equal ones the first. Chosen are
// the items with larger keys than `key`, and those with this one up to item `low`. Which they are
// is found by counting: first key, bit by bit from the top; then the last item, by bisection.
template <class Key>
struct Choice {
  Key largest = 0;            // of all
  int64_t low = 0, high = 0;  // items, the last one chosen between them
  double wanted = 0;          // at least 1
  Key key = 0;
  Key than = 0;       // the next count is of items with larger keys; and, once the key is
  bool ties = false;  // known, of those with it up to last()
  int bit = int(sizeof(Key)) * 8 - 2;

  __device__ __forceinline__ Key candidate() const { return key | Key(1) << bit; }
  __device__ __forceinline__ int64_t last() const { return low + (high - low) / 2; }

  // Prepares for the next count; false: the choice is made.
  __device__ __forceinline__ bool prepare() {
    while (bit >= 0 && candidate() > largest) --bit;
    ties = bit < 0;
    than = ties ? key : candidate() - 1;
    return !ties || low != high;
  }
  // Takes a count.
  __device__ __forceinline__ bool next(double count) {
    if (bit >= 0) {
      if (count >= wanted) key = candidate();
      --bit;
    } else if (count >= wanted) {
      high = last();
    } else {
      low = last() + 1;
    }
    return prepare();
  }
};

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

  // The direction of steepest ascent of what source(k, chunk, valid) gives. Sets `finite`
  // to whether all of it is finite; where not, nothing moves.
  //
  // All passes over the group are rounds of one loop, so that `source` is compiled once.
  template <Norm kNorm, class Source>
  __device__ __forceinline__ Direction<A> direction(Source source, double step, bool* finite) {
    Direction<A> u;
    [[maybe_unused]] int top = 0;  // of this thread's elements: the first of the largest
    [[maybe_unused]] Choice<Bits<A>> choice;
#pragma unroll 1
    for (bool again = false;; again = true) {  // the first round measures; others are rare
      Sums s;
      A most = 0;
      each([&](int k, int64_t c, unsigned valid) {
        const Chunk g = source(k, c, valid);
        if (kNorm == Norm::l1 && again) return count(choice, u.ties, k, valid, g, s);
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          if constexpr (kNorm == Norm::l1)
            if (extent(g[i]) > most) top = k * kElements + i;
          most = larger(most, extent(g[i]));
          if constexpr (kNorm == Norm::l2) s.a += double(g[i] * u.scale) * double(g[i] * u.scale);
        }
      });
      if (kNorm == Norm::l1 && again) {
        s = team_.agree(kSumA | kSumB, s);
        bool more = true;
        if (choice.wanted == 0) {  // the first count is of what is not zero, and of all
          choice.wanted = smaller(double(top_count(p_.rule.top, int64_t(s.b))), s.a);
          more = choice.prepare();
        } else {
          more = choice.next(s.a);
        }
        u.ties = choice.ties ? up_to(choice.last()) : 0;
        if (more) continue;
        u.key = choice.key;
        u.factor = A(step / choice.wanted);
        return u;
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
        u.ties = 0;
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
  // l1. a: how many of a chunk's elements the choice asks for, the thread's first `ties` of those
  // that tie; b: how many there are.
  __device__ __forceinline__ static void count(const Choice<Bits<A>>& choice, int ties, int k,
                                               unsigned valid, const Chunk& g, Sums& s) {
    s.b += __popc(valid);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const Bits<A> bits = bits_of(magnitude(g[i]));
      s.a += valid >> i & 1 &&
             (bits > choice.than || (bits == choice.than && k * kElements + i < ties));
    }
  }

 protected:
  using Base::p_, Base::team_, Base::element_of, Base::up_to, Base::begin_, Base::end_;
};

}  // namespace embattle::cuda
