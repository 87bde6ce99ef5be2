// Reading and writing rows of tensors whose element type is known at compile time or not, in
// vectors of 16 bytes where they are aligned; which elements a thread has does not depend on that.
#pragma once

#include "number.cuh"

namespace embattle::cuda {

__host__ __device__ inline bool aligned_to(const void* p, size_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % bytes == 0;
}

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
  switch (type) {
    case Dtype::f32:
      return load(float{});
    case Dtype::f64:
      return load(double{});
    case Dtype::f16:
      return load(Half{});
    case Dtype::bf16:
      return load(BFloat16{});
  }
}

__device__ __forceinline__ void store_one(void* data, Dtype type, int64_t at, double value) {
  switch (type) {
    case Dtype::f32:
      static_cast<float*>(data)[at] = Round<float>::nearest(value);
      break;
    case Dtype::f64:
      static_cast<double*>(data)[at] = value;
      break;
    case Dtype::f16:
      static_cast<Half*>(data)[at] = Round<Half>::nearest(value);
      break;
    case Dtype::bf16:
      static_cast<BFloat16*>(data)[at] = Round<BFloat16>::nearest(value);
      break;
  }
}

// The inverse of load_part.
template <int kCount>
__device__ __forceinline__ void store_part(void* data, Dtype type, int64_t at, int64_t left,
                                           bool vector, const double (&values)[kCount]) {
  const auto store = [&](auto tag) {
    using T = decltype(tag);
    constexpr int kPiece = 16 / int(sizeof(T)) < kCount ? 16 / int(sizeof(T)) : kCount;
    T* const to = static_cast<T*>(data) + at;
#pragma unroll
    for (int i = 0; i < kCount; i += kPiece) {
      Pack<T, kPiece> pack;
#pragma unroll
      for (int j = 0; j < kPiece; ++j) pack.at[j] = Round<T>::nearest(values[i + j]);
      if (vector && left - i >= kPiece) {
        *reinterpret_cast<Pack<T, kPiece>*>(to + i) = pack;
      } else {
#pragma unroll
        for (int j = 0; j < kPiece; ++j)
          if (j < left - i) to[i + j] = pack.at[j];
      }
    }
  };
  switch (type) {
    case Dtype::f32:
      return store(float{});
    case Dtype::f64:
      return store(double{});
    case Dtype::f16:
      return store(Half{});
    case Dtype::bf16:
      return store(BFloat16{});
  }
}

// A table's rows in steps of kStep elements.
constexpr int kStep = 4;

struct Rows {
  const void* data = nullptr;
  Dtype type = Dtype::f32;
  int64_t dim = 0;
  bool vector = false;  // every step of every row is aligned

  static Rows of(const void* data, Dtype type, int64_t dim) {
    const size_t step = size_t(kStep * bytes_of(type) < 16 ? kStep * bytes_of(type) : 16);
    return {data, type, dim, dim % kStep == 0 && aligned_to(data, step)};
  }
  __device__ __forceinline__ void load(int64_t row, int64_t column, double (&out)[kStep]) const {
    load_part(data, type, row * dim + column, dim - column, vector, out);
  }
  // Precondition: data may be written.
  __device__ __forceinline__ void store(int64_t row, int64_t column,
                                        const double (&values)[kStep]) const {
    store_part(const_cast<void*>(data), type, row * dim + column, dim - column, vector, values);
  }
};

}  // namespace embattle::cuda
