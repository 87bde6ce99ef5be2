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

  struct Slow {
    A at[kElements];
  };
  static __device__ EMBATTLE_NOINLINE Slow load_some(const void* data, Dtype type, int64_t c,
                                                     unsigned valid) {
    Slow out;
#pragma unroll
    for (int i = 0; i < kElements; ++i)
      out.at[i] = valid >> i & 1 ? load_one<A>(data, type, c * kElements + i) : A(0);
    return out;
  }

  static __device__ EMBATTLE_NOINLINE void copy_some(unsigned char* to, const unsigned char* from,
                                                     int size, unsigned valid) {
    for (int i = 0; i < kElements; ++i) {
      const bool here = valid >> i & 1;
      if (size == 2)
        reinterpret_cast<uint16_t*>(to)[i] = here ? reinterpret_cast<const uint16_t*>(from)[i] : 0;
      else if (size == 4)
        reinterpret_cast<uint32_t*>(to)[i] = here ? reinterpret_cast<const uint32_t*>(from)[i] : 0;
      else
        reinterpret_cast<uint64_t*>(to)[i] = here ? reinterpret_cast<const uint64_t*>(from)[i] : 0;
    }
  }

  template <class U>
  static __device__ EMBATTLE_NOINLINE void write_some(U* to, const Pack<U, kElements>& values,
                                                      unsigned here, unsigned valid,
                                                      const U* base) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      if (!(here >> i & 1)) continue;
      to[i] = valid >> i & 1 ? values.at[i] : base ? base[i] : Round<U>::nearest(0.f);
    }
  }

  // Writes a chunk of an output that is not of T.
  static __device__ EMBATTLE_NOINLINE void store_some(void* data, Dtype type, int64_t c,
                                                      unsigned here, unsigned valid,
                                                      const Slow& values, const T* base) {
    for (int i = 0; i < kElements; ++i) {
      if (!(here >> i & 1)) continue;
      const int64_t at = c * kElements + i;
      store_one(data, type, at, valid >> i & 1 ? values.at[i] : base ? A(widen(base[at])) : A(0));
    }
  }

  static __device__ EMBATTLE_NOINLINE Pack<T, kElements> load_some_as_is(const T* from,
                                                                         unsigned valid) {
    Pack<T, kElements> out;
#pragma unroll
    for (int i = 0; i < kElements; ++i)
      out.at[i] = valid >> i & 1 ? from[i] : Round<T>::nearest(0.f);
    return out;
  }
};

}  // namespace embattle::cuda
