// The first two steps of clip.cu: norms of pieces of rows, and the samples' norms and factors.
#pragma once

#include "../formulas.h"
#include "../launch_clip.h"
#include "rows.cuh"
#include "team.cuh"

namespace embattle::cuda {
namespace {

constexpr int kMost = 64;  // tensors of a launch: its arguments have 4 KB
constexpr int kThreads = 256;
// What the threads' sums take: eight of a thread, with 16 bytes of halves. The sums of a pack's
// n-th elements are kStride<elements> apart from those of the next ones: no two lanes then meet in
// a bank, neither where threads write theirs nor where they read those of neighbouring columns.
template <int kCount>
constexpr int kStride = kThreads + 16 / kCount;
constexpr size_t kShared = 8 * kStride<8> * sizeof(double);

enum class Step : int { pieces, factors, sums };

// A pack is 16 bytes of a row, or less at its end.
struct Params {
  Step from = Step::pieces, to = Step::sums;
  bool each = false;  // a norm for each tensor; else one for the whole list
  bool automatic = false;
  int count = 0;      // tensors
  int piece = 256;    // packs of a piece
  int across = 32;    // packs of a tile of columns: a power of two
  int lanes = 32;     // threads on a piece: a power of two
  int finishers = 1;  // threads on a norm: a power of two
  int64_t batch = 0;
  int64_t pieces_of_sample = 0;  // of the whole list, not of these tensors alone
  int64_t columns = 1;           // of the norms
  int64_t column = 0;            // where in the norms the first one goes
  double gamma = 0;
  double* pieces = nullptr;   // [batch, pieces_of_sample]
  double* factors = nullptr;  // [columns, batch], or null: only norms are wanted
  Data norms;                 // [batch, columns]
  ConstData weights;          // [batch] or absent
  const void* grad[kMost];
  void* sum[kMost];
  int64_t width[kMost];
  int64_t first_piece[kMost + 1];  // the tensors' first pieces, numbered through the list
  int64_t first_tile[kMost + 1];   // their first tiles of columns, numbered from 0
  double bound[kMost];
  Dtype type[kMost];
};
static_assert(sizeof(Params) <= 4096);

// The tensor that a piece or a tile belongs to.
__device__ __forceinline__ int tensor_of(const int64_t* first, int count, int64_t tile) {
  int low = 0, high = count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (first[middle] <= tile)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

template <class T>
__device__ double scaled_squares(const Lanes& team, const T* x, int64_t n, double scale) {
  constexpr int kCount = 16 / int(sizeof(T));
  const int64_t full = n / kCount;
  double sum = 0;
  const auto add = [&](const Pack<T, kCount>& pack) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const double v = double(widen(pack.at[i])) * scale;
      sum += v * v;
    }
  };
  if (aligned(x, 16)) {
#pragma unroll 8
    for (int64_t c = team.rank; c < full; c += team.size)
      add(raw_pack<kCount>(x + c * kCount, true));
  } else {
#pragma unroll 2
    for (int64_t c = team.rank; c < full; c += team.size)
      add(raw_pack<kCount>(x + c * kCount, false));
  }
  if (full * kCount < n && full % team.size == team.rank)
    add(raw_part<kCount>(x + full * kCount, n - full * kCount, false));
  return team.sum(sum);
}

template <class T>
__device__ double norm_of(const Lanes& team, const T* x, int64_t n) {
  const double sum = scaled_squares(team, x, n, 1);
  if constexpr (sizeof(T) == 8) {
    if (!(sum > 1e-280 && sum < 1e+280)) {  // squares have left the range of doubles
      double largest = 0;
      for (int64_t i = team.rank; i < n; i += team.size) largest = larger(largest, magnitude(x[i]));
      largest = team.max(largest);
      if (largest > 0 && is_finite(largest)) {
        const double scale = largest < 1 ? 0x1p600 : 0x1p-600;
        return sqrt(scaled_squares(team, x, n, scale)) / scale;
      }
    }
  }
  return sqrt(sum);
}

__device__ __forceinline__ double piece_norm(const Lanes& team, const Params& p, int64_t sample,
                                             int64_t piece) {
  const int t = tensor_of(p.first_piece, p.count, piece);
  const auto norm = [&](auto tag) {
    using T = decltype(tag);
    const int64_t elements = p.piece * (16 / int64_t(sizeof(T)));
    const int64_t column = (piece - p.first_piece[t]) * elements, width = p.width[t];
    return norm_of(team, static_cast<const T*>(p.grad[t]) + sample * width + column,
                   smaller(elements, width - column));
  };
  return for_type(p.type[t], norm);
}

__device__ __forceinline__ void take_pieces(const Params& p) {
  const Lanes team(p.lanes);
  const int64_t step = team.count / p.batch, rest = team.count % p.batch;
  int64_t piece = p.first_piece[0] + team.index / p.batch, sample = team.index % p.batch;
  while (piece < p.first_piece[p.count]) {
    const double norm = piece_norm(team, p, sample, piece);
    if (team.rank == 0) p.pieces[sample * p.pieces_of_sample + piece] = norm;
    piece += step;
    sample += rest;
    if (sample >= p.batch) {
      sample -= p.batch;
      ++piece;
    }
  }
}

// A sample's norm over pieces [begin, end). They are read from the second-level cache: other blocks
// have just written them.
__device__ __forceinline__ double joined_norm(const Lanes& team, const double* pieces,
                                              int64_t begin, int64_t end) {
  double sum = 0;
#pragma unroll 4
  for (int64_t i = begin + team.rank; i < end; i += team.size) {
    const double part = __ldcg(pieces + i);
    sum += part * part;
  }
  sum = team.sum(sum);
  if (sum > 1e-280 && sum < 1e+280) return sqrt(sum);
  // Nothing at all, not a number, or squares have left the range of doubles.
  double scale = 0;
  for (int64_t i = begin + team.rank; i < end; i += team.size)
    scale = larger(scale, __ldcg(pieces + i));
  scale = team.max(scale);
  if (!(scale > 0 && is_finite(scale))) scale = 1;
  sum = 0;
  for (int64_t i = begin + team.rank; i < end; i += team.size) {
    const double part = __ldcg(pieces + i) / scale;
    sum += part * part;
  }
  return scale * sqrt(team.sum(sum));
}

__device__ __forceinline__ void take_factors(const Params& p) {
  const Lanes team(p.finishers);
  const int64_t norms = p.each ? p.count : 1;
  for (int64_t at = team.index; at < norms * p.batch; at += team.count) {
    const int64_t i = at / p.batch, sample = at % p.batch;
    const double norm =
        joined_norm(team, p.pieces + sample * p.pieces_of_sample, p.each ? p.first_piece[i] : 0,
                    p.each ? p.first_piece[i + 1] : p.pieces_of_sample);
    if (team.rank != 0) continue;
    const int64_t column = p.column + i;
    store_one(p.norms.data, p.norms.dtype, sample * p.columns + column, norm);
    if (!p.factors) continue;
    const double weight =
        p.weights.data ? load_one<double>(p.weights.data, p.weights.dtype, sample) : 1;
    p.factors[column * p.batch + sample] =
        weight == 0 ? 0 : weight * clip_factor(p.automatic, norm, p.bound[i], p.gamma);
  }
}

}  // namespace
}  // namespace embattle::cuda
