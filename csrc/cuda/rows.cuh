// Reading and writing rows of tensors whose element type is known at compile time or not, in
// vectors of 16 bytes where they are aligned; which elements a thread has does not depend on that.
#pragma once

#include <algorithm>

#include "number.cuh"

namespace embattle::cuda {

// x[0, kCount) as it is in memory. `vector`: x is aligned for one access.
template <int kCount, class T>
__device__ __forceinline__ Pack<T, kCount> raw_pack(const T* x, bool vector) {
  if (vector) return *reinterpret_cast<const Pack<T, kCount>*>(x);
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) pack.at[i] = x[i];
  return pack;
}

// The same where only the first `left` elements are there; zero beyond.
template <int kCount, class T>
__device__ __forceinline__ Pack<T, kCount> raw_part(const T* x, int64_t left, bool vector) {
  if (left >= kCount) return raw_pack<kCount>(x, vector);
  Pack<T, kCount> pack;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    pack.at[i] = T();
    if (i < left) pack.at[i] = x[i];
  }
  return pack;
}

// Elements at, at + 1, ... of a tensor as doubles: kCount, or the first `left` and then zeros.
// `vector`: the place is aligned for kCount elements (or 16 bytes).
template <int kCount>
__device__ __forceinline__ void load_part(const void* data, Dtype type, int64_t at, int64_t left,
                                          bool vector, double (&out)[kCount]) {
  const auto load = [&](auto tag) {
    using T = decltype(tag);
    constexpr int kPiece = 16 / int(sizeof(T)) < kCount ? 16 / int(sizeof(T)) : kCount;
#pragma unroll
    for (int i = 0; i < kCount; i += kPiece) {
      const auto pack = raw_part<kPiece>(static_cast<const T*>(data) + at + i, left - i, vector);
#pragma unroll
      for (int j = 0; j < kPiece; ++j) out[i + j] = double(widen(pack.at[j]));
    }
  };
  for_type(type, load);
}

// values[0, kCount) to `to`, or the first `left` of them. `vector`: the place is aligned for kCount
// elements (or 16 bytes), and left is at least kCount.
template <class T, int kCount>
__device__ __forceinline__ void store_typed(T* to, int64_t left, bool vector,
                                            const double (&values)[kCount]) {
  constexpr int kPiece = 16 / int(sizeof(T)) < kCount ? 16 / int(sizeof(T)) : kCount;
#pragma unroll
  for (int i = 0; i < kCount; i += kPiece) {
    Pack<T, kPiece> pack;
#pragma unroll
    for (int j = 0; j < kPiece; ++j) pack.at[j] = Round<T>::nearest(values[i + j]);
    if (vector) {
      if constexpr (sizeof pack == 16)
        store_16(to + i, &pack);
      else
        *reinterpret_cast<Pack<T, kPiece>*>(to + i) = pack;
    } else {
#pragma unroll
      for (int j = 0; j < kPiece; ++j)
        if (j < left - i) to[i + j] = pack.at[j];
    }
  }
}

// The inverse of load_part; `vector` as for store_typed.
template <int kCount>
__device__ __forceinline__ void store_part(void* data, Dtype type, int64_t at, int64_t left,
                                           bool vector, const double (&values)[kCount]) {
  const auto store = [&](auto tag) {
    store_typed(static_cast<decltype(tag)*>(data) + at, left, vector, values);
  };
  for_type(type, store);
}

// A table's rows, in steps of as many elements as some type (the table's own, mostly) has in 16
// bytes.
struct Rows {
  const void* data = nullptr;
  Dtype type = Dtype::f32;
  int64_t dim = 0;
  bool vector = false;  // every step of every row is aligned

  template <class T>
  static constexpr int kStep = 16 / int(sizeof(T));

  static Rows of(const void* data, Dtype type, int64_t dim, int step) {
    const size_t bytes = size_t(std::min(16, step * bytes_of(type)));
    return {data, type, dim, dim % step == 0 && aligned(data, bytes)};
  }

  // A step of a table whose type is T, zero beyond the last column.
  template <class T>
  __device__ __forceinline__ Pack<T, kStep<T>> raw(int64_t row, int64_t column) const {
    return raw_part<kStep<T>>(static_cast<const T*>(data) + row * dim + column, dim - column,
                              vector);
  }
  template <int kCount>
  __device__ __forceinline__ void load(int64_t row, int64_t column, double (&out)[kCount]) const {
    load_part(data, type, row * dim + column, dim - column, vector, out);
  }
  // Precondition: data may be written.
  template <int kCount>
  __device__ __forceinline__ void store(int64_t row, int64_t column,
                                        const double (&values)[kCount]) const {
    store_part(const_cast<void*>(data), type, row * dim + column, dim - column, vector, values);
  }
  // The same for a table whose type is T.
  template <class T, int kCount>
  __device__ __forceinline__ void store_as(int64_t row, int64_t column,
                                           const double (&values)[kCount]) const {
    store_typed(static_cast<T*>(const_cast<void*>(data)) + row * dim + column, dim - column, vector,
                values);
  }
};

}  // namespace embattle::cuda
