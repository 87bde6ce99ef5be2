// What csrc/cuda takes of CUB, for the emulator: the sort runs on the host, and counts as one
// launch. As in CUB, a call without scratch memory says how much is needed, the result lies in the
// one or the other buffer, and an error that others have left is taken for one's own.
#pragma once

#include <algorithm>
#include <numeric>
#include <utility>
#include <vector>

#include "cuda_runtime.h"

namespace cub {

template <class T>
struct DoubleBuffer {
  T* d_buffers[2] = {};
  int selector = 0;
  DoubleBuffer() = default;
  DoubleBuffer(T* current, T* alternate) : d_buffers{current, alternate} {}
  T* Current() const { return d_buffers[selector]; }
  T* Alternate() const { return d_buffers[selector ^ 1]; }
};

struct DeviceRadixSort {
  // Stable, by bits [begin_bit, end_bit) of keys whose sign is not among them.
  template <class Key, class Value>
  static cudaError_t SortPairs(void* scratch, size_t& bytes, DoubleBuffer<Key>& keys,
                               DoubleBuffer<Value>& values, int64_t count, int begin_bit,
                               int end_bit, cudaStream_t) {
    const cudaError_t left = cudaGetLastError();
    if (left != cudaSuccess) return left;
    if (begin_bit < 0 || end_bit < begin_bit || end_bit > 63) return cudaErrorInvalidValue;
    const int passes = (end_bit - begin_bit + 7) / 8;
    const size_t needed = 1 + size_t(passes) * 2048 + size_t(count) / 8;
    if (!scratch) {
      bytes = needed;
      return cudaSuccess;
    }
    if (bytes < needed) return cudaErrorInvalidValue;
    if (!emu::launch_on_host()) return cudaErrorLaunchFailure;
    std::memset(scratch, 0xff, needed);
    if (passes == 0) return cudaSuccess;
    const auto digits = [&](int64_t i) {
      const uint64_t most = (uint64_t(1) << (end_bit - begin_bit)) - 1;
      return uint64_t(keys.Current()[i]) >> begin_bit & most;
    };
    std::vector<int64_t> order(static_cast<size_t>(count));
    std::iota(order.begin(), order.end(), int64_t(0));
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return digits(a) < digits(b); });
    put(keys, order, passes);
    put(values, order, passes);
    return cudaSuccess;
  }

 private:
  // Every pass goes from one buffer to the other. What is not the result is garbage.
  template <class T>
  static void put(DoubleBuffer<T>& buffers, const std::vector<int64_t>& order, int passes) {
    T* const out = buffers.Alternate();
    std::transform(order.begin(), order.end(), out,
                   [&](int64_t i) { return buffers.Current()[i]; });
    if (passes % 2 == 0)
      std::copy_n(out, order.size(), buffers.Current());
    else
      buffers.selector ^= 1;
    std::memset(buffers.Alternate(), 0xff, order.size() * sizeof(T));
  }
};

}  // namespace cub
