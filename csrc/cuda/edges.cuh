// Chunks at a group's edge or at a mask's, and those that are not aligned: element by element. Rare
// or long things, not inlined.
#pragma once

#include "number.cuh"

namespace embattle::cuda {

// Of chunks of kElements elements, T in memory and A in registers.
template <class T, class A, int kElements>
struct Edges {
  // Which elements of a chunk belong to the group of elements [begin, end).
  static __device__ __forceinline__ unsigned in_range(int64_t chunk, int64_t begin, int64_t end) {
    const int64_t e = chunk * kElements;
    constexpr unsigned kAll = (1u << kElements) - 1;
    unsigned bits = kAll;
    if (e < begin) bits &= kAll << int(begin - e);
    if (e + kElements > end) bits &= kAll >> int(e + kElements - end);
    return bits;
  }

  // Those that are not masked out either. `mask`: of the group's first row, or null.
  static __device__ EMBATTLE_NOINLINE unsigned valid(int64_t chunk, int64_t begin, int64_t end,
                                                     const bool* mask, int64_t dim) {
    unsigned bits = in_range(chunk, begin, end);
    if (!mask) return bits;
    int64_t at = chunk * kElements - begin;  // counted from the group's first element
    int i = at < 0 ? int(-at) : 0;
    at += i;
    // 32-bit division is several times cheaper.
    const int64_t row =
        end - begin < (int64_t(1) << 31) - 64 ? unsigned(at) / unsigned(dim) : at / dim;
    int64_t column = at - row * dim;
    mask += row;
    while (i < kElements && bits >> i) {
      const int left = dim - column < kElements - i ? int(dim - column) : kElements - i;
      if (!*mask) bits &= ~(((1u << left) - 1) << i);
      i += left;
      ++mask;
      column = 0;
    }
    return bits;
  }

  // The valid elements of those at `from`, and zeros.
  template <class U>
  static __device__ EMBATTLE_NOINLINE Pack<U, kElements> load_some(const U* from, unsigned valid) {
    Pack<U, kElements> out;
#pragma unroll
    for (int i = 0; i < kElements; ++i) out[i] = valid >> i & 1 ? from[i] : nearest<U>(0.f);
    return out;
  }
  // The same of elements of any type.
  static __device__ EMBATTLE_NOINLINE Pack<A, kElements> load_any(const void* data, Dtype type,
                                                                  int64_t c, unsigned valid) {
    Pack<A, kElements> out;
#pragma unroll
    for (int i = 0; i < kElements; ++i)
      out[i] = valid >> i & 1 ? load_one<A>(data, type, c * kElements + i) : A(0);
    return out;
  }

  static __device__ EMBATTLE_NOINLINE void copy_some(void* to, const void* from, Dtype type,
                                                     unsigned valid) {
    for_type(type, [&]<class U>(U) {
      for (int i = 0; i < kElements; ++i)
        static_cast<U*>(to)[i] = valid >> i & 1 ? static_cast<const U*>(from)[i] : U();
    });
  }

  // Writes those of a chunk's elements that are here: the valid ones, and `base` (or zero) in place
  // of others.
  static __device__ EMBATTLE_NOINLINE void write_some(T* to, const Pack<T, kElements>& values,
                                                      unsigned here, unsigned valid,
                                                      const T* base) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      if (!(here >> i & 1)) continue;
      to[i] = valid >> i & 1 ? values[i] : base ? base[i] : nearest<T>(0.f);
    }
  }
  // The same to an output of any type.
  static __device__ EMBATTLE_NOINLINE void write_any(void* data, Dtype type, int64_t c,
                                                     unsigned here, unsigned valid,
                                                     const Pack<A, kElements>& values,
                                                     const T* base) {
    for (int i = 0; i < kElements; ++i) {
      if (!(here >> i & 1)) continue;
      const int64_t at = c * kElements + i;
      store_one(data, type, at, valid >> i & 1 ? values[i] : base ? A(widen(base[at])) : A(0));
    }
  }
};

}  // namespace embattle::cuda
