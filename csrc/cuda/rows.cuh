// Reading and writing rows of tensors whose element type is known at compile time or not, in
// vectors of 16 bytes where they are aligned; which elements a thread has does not depend on that.
#pragma once

#include <algorithm>

#include "number.cuh"

namespace embattle::cuda {

// x[0, kCount), or its first `left` elements and then zeros. `vector`: x is aligned for a pack of
// at most 16 bytes, and left is at least kCount.
template <int kCount, class T>
__device__ __forceinline__ Pack<T, kCount> load_part(const T* x, int64_t left, bool vector) {
  Pack<T, kCount> pack;
  if (left >= kCount) {
    if (vector) return load_pack<kCount>(x);
#pragma unroll
    for (int i = 0; i < kCount; ++i) pack[i] = x[i];
  } else {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      pack[i] = T();
      if (i < left) pack[i] = x[i];
    }
  }
  return pack;
}

// Writes values[0, kCount), or the first `left` of them; `vector` as above.
template <class T, int kCount>
__device__ __forceinline__ void store_part(T* to, int64_t left, bool vector,
                                           const Pack<T, kCount>& values) {
  if (vector) return store_pack<true>(to, values);
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (i < left) to[i] = values[i];
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

  template <class D>
  static Rows of(const D& x, int64_t dim, int step) {
    const size_t bytes = size_t(std::min(16, step * bytes_of(x.dtype)));
    return {x.data, x.dtype, dim, dim % step == 0 && aligned(x.data, bytes)};
  }

  template <class A>
  __device__ __forceinline__ A at(int64_t row, int64_t column) const {
    return load_one<A>(data, type, row * dim + column);
  }
  // A step of a table whose type is T, zero beyond the last column.
  template <class T, int kCount = kStep<T>>
  __device__ __forceinline__ Pack<T, kCount> raw(int64_t row, int64_t column) const {
    return load_part<kCount>(static_cast<const T*>(data) + row * dim + column, dim - column,
                             vector);
  }
  template <int kCount>
  __device__ __forceinline__ Pack<double, kCount> load(int64_t row, int64_t column) const {
    return for_type(type, [&]<class T>(T) { return widened<double>(raw<T, kCount>(row, column)); });
  }
  // Precondition: data may be written, and its type is T.
  template <class T, int kCount>
  __device__ __forceinline__ void put(int64_t row, int64_t column,
                                      const Pack<T, kCount>& values) const {
    store_part(static_cast<T*>(const_cast<void*>(data)) + row * dim + column, dim - column, vector,
               values);
  }
  // Precondition: data may be written.
  template <int kCount>
  __device__ __forceinline__ void store(int64_t row, int64_t column,
                                        const Pack<double, kCount>& values) const {
    for_type(type, [&]<class T>(T) { put(row, column, narrowed<T>(values)); });
  }
};

// The sum of a row's squares, times unit^2: the part of thread `rank` of `size`.
__device__ __forceinline__ double squares(const Rows& rows, int64_t row, int rank, int size,
                                          double unit = 1) {
  constexpr int kCount = 4;
  double sum = 0;
  for_type(rows.type, [&]<class T>(T) {
    for (int64_t c = kCount * rank; c < rows.dim; c += kCount * size) {
      const auto x = widened<double>(rows.raw<T, kCount>(row, c));
#pragma unroll
      for (int i = 0; i < kCount; ++i) sum += x[i] * unit * (x[i] * unit);
    }
  });
  return sum;
}

}  // namespace embattle::cuda
