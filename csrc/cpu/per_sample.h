// Squared norms of samples over a list of tensors, shared by per_sample_norm and clip_and_sum.
#pragma once

#include "../launch_clip.h"
#include "scratch.h"
#include "squares.h"

namespace embattle {
namespace {

// A list's columns [0, width), all tensors side by side, cut into chunks of kChunk columns. Chunks
// depend on the shapes alone, so that sums do not depend on the number of threads.
constexpr int64_t kChunk = 65536;

struct SampleList {
  const SampleTensor* tensors;
  int64_t count;
  int64_t width = 0;  // columns of all tensors
  int64_t bytes = 0;  // of one sample
  bool exact;         // norms are float64

  SampleList(const SampleTensor* t, int64_t n, bool f64) : tensors(t), count(n), exact(f64) {
    for (int64_t i = 0; i < n; ++i) {
      width += t[i].width;
      bytes += t[i].width * bytes_of(t[i].grad.dtype);
    }
  }

  template <class T>
  double squares_of(const T* x, int64_t n) const {
    return exact ? squares_wide(x, n) : squares(x, n);
  }
};

// The norm of a sample whose plain sum of squares has left float64's range.
inline double scaled_norm(const SampleList& list, int64_t sample) {
  const auto for_rows = [&](const auto& f) {
    for (int64_t t = 0; t < list.count; ++t) {
      const int64_t width = list.tensors[t].width;
      with_type(list.tensors[t].grad.dtype, [&]<class T>(T*) {
        f(static_cast<const T*>(list.tensors[t].grad.data) + sample * width, width);
      });
    }
  };
  double most = 0, sum = 0;
  for_rows([&](auto* x, int64_t n) { most = largest(x, n, most); });
  if (most == 0 || !(most < __builtin_inf())) return most;
  const double scale = scale_for(most);
  for_rows([&](auto* x, int64_t n) { sum += squares_wide(x, n, scale); });
  return __builtin_sqrt(sum) / scale;
}

// Norms of the samples [first, first + samples) from sums of squares, parts[count, samples].
inline void norms_from_parts(const SampleList& list, int64_t first, int64_t samples,
                             const double* parts, int64_t count, double* norms) {
  for (int64_t s = 0; s < samples; ++s) {
    double sum = 0;
    for (int64_t part = 0; part < count; ++part) sum += parts[part * samples + s];
    const bool in_range = !list.exact || (sum > 1e-280 && sum < __builtin_inf());
    norms[s] = in_range ? __builtin_sqrt(sum) : scaled_norm(list, first + s);
  }
}

// Norms of the samples [first, first + samples) into norms[0, samples), in one read.
inline void sample_norms(const SampleList& list, int64_t first, int64_t samples, double* norms,
                         ParallelFor parallel_for) {
  const int64_t chunks = list.width == 0 ? 1 : (list.width + kChunk - 1) / kChunk;
  const int64_t chunk_width = list.width < kChunk ? list.width : kChunk;
  // A block of samples is gone through tensor by tensor: short rows are then read in order.
  const int64_t block = chunk_width == 0 ? samples : 1 + 4 * kGrain / (1 + chunk_width);
  const int64_t blocks = block == 0 ? 0 : (samples + block - 1) / block;
  Scratch<double> held(chunks > 1 ? chunks * samples : 0);
  double* const partial = chunks > 1 ? held.get() : norms;  // [chunks, samples]

  const auto body = [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t chunk = item / blocks, low = item % blocks * block;
      const int64_t high = low + block < samples ? low + block : samples;
      const int64_t from = chunk * kChunk;
      const int64_t to = from + kChunk < list.width ? from + kChunk : list.width;
      double* const sums = partial + chunk * samples;
      for (int64_t s = low; s < high; ++s) sums[s] = 0;
      int64_t column = 0;
      for (int64_t t = 0; t < list.count && column < to; ++t) {
        const SampleTensor& tensor = list.tensors[t];
        const int64_t begin_column = column < from ? from - column : 0;
        const int64_t end_column = column + tensor.width < to ? tensor.width : to - column;
        column += tensor.width;
        if (begin_column >= end_column) continue;
        with_type(tensor.grad.dtype, [&]<class T>(T*) {
          const T* const rows =
              static_cast<const T*>(tensor.grad.data) + first * tensor.width + begin_column;
          for (int64_t s = low; s < high; ++s)
            sums[s] += list.squares_of(rows + s * tensor.width, end_column - begin_column);
        });
      }
    }
  };
  const int64_t work = block * (chunk_width + 8 * list.count / chunks);
  parallel(parallel_for, chunks * blocks, kGrain / (1 + work) + 1, body);

  norms_from_parts(list, first, samples, partial, chunks, norms);
}

}  // namespace
}  // namespace embattle
