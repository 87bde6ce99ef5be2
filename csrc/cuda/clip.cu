// per_sample_norm and clip_and_sum.
//
// Three phases, each one launch for up to kMost tensors of the list: norms of pieces of rows, the
// norms of samples and their factors, and the weighted sums over the batch by tiles of columns.
// Every sum is formed in an order that depends on shapes and the device alone.
#include "../formulas.h"
#include "launching.h"
#include "rows.cuh"
#include "team.cuh"

namespace embattle::cuda {
namespace {

constexpr int kMost = 64;  // tensors of a launch: its arguments have 4 KB
constexpr int kThreads = 256;

// Some tensors of the list, cut into tiles of columns.
struct Piece {
  int count = 0;
  int64_t batch = 0;
  int64_t tile = 0;  // columns of a tile; sums: of a 16-byte access
  const void* grad[kMost];
  void* sum[kMost];
  int64_t width[kMost];
  int64_t first[kMost + 1];  // the tensors' first tiles, numbered through the list
  Dtype type[kMost];
};

// Whose norms come from which tiles; all tensors together, or each one.
struct Segments {
  int count = 0;
  int64_t column = 0;  // where in the norms the first one goes
  int64_t first[kMost + 1];
  double bound[kMost];
};

struct Finish {
  int64_t batch = 0, tiles = 0, columns = 0;
  const double* pieces = nullptr;  // [batch, tiles]
  Data norms;                      // [batch, columns]
  double* factors = nullptr;       // [columns, batch], or null: only norms are wanted
  ConstData weights;               // [batch] or absent
  bool automatic = false;
  double gamma = 0;
};

__device__ __forceinline__ int tensor_of(const Piece& p, int64_t tile) {
  int low = 0, high = p.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (p.first[middle] <= tile)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// ---- Norms ----

template <class T>
__device__ double scaled_squares(Team& team, const T* x, int64_t n, double scale) {
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
#pragma unroll 4
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
__device__ double norm_of(Team& team, const T* x, int64_t n) {
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

__global__ void __launch_bounds__(kThreads)
    piece_norm_kernel(const __grid_constant__ Piece p, double* norms, int64_t tiles, int lanes) {
  Shape shape;
  shape.lanes = lanes;
  Team team(shape, nullptr, nullptr, nullptr);
  const int64_t own = p.first[p.count] - p.first[0];
  for (int64_t unit = team.index; unit < own * p.batch; unit += team.count) {
    const int64_t sample = unit / own, tile = p.first[0] + unit % own;
    const int t = tensor_of(p, tile);
    const int64_t column = (tile - p.first[t]) * p.tile, width = p.width[t];
    const int64_t at = sample * width + column, n = smaller(p.tile, width - column);
    double norm = 0;
    switch (p.type[t]) {
      case Dtype::f32:
        norm = norm_of(team, static_cast<const float*>(p.grad[t]) + at, n);
        break;
      case Dtype::f64:
        norm = norm_of(team, static_cast<const double*>(p.grad[t]) + at, n);
        break;
      case Dtype::f16:
        norm = norm_of(team, static_cast<const Half*>(p.grad[t]) + at, n);
        break;
      case Dtype::bf16:
        norm = norm_of(team, static_cast<const BFloat16*>(p.grad[t]) + at, n);
        break;
    }
    if (team.rank == 0) norms[sample * tiles + tile] = norm;
  }
}

// A warp for each sample and segment.
__global__ void __launch_bounds__(kThreads)
    finish_kernel(const __grid_constant__ Segments s, const __grid_constant__ Finish f) {
  Team team(Shape{}, nullptr, nullptr, nullptr);
  for (int64_t unit = team.index; unit < f.batch * s.count; unit += team.count) {
    const int64_t sample = unit / s.count;
    const int segment = int(unit % s.count);
    const double* const pieces = f.pieces + sample * f.tiles;
    const int64_t begin = s.first[segment], end = s.first[segment + 1];
    double scale = 0;
    for (int64_t i = begin + team.rank; i < end; i += 32) scale = larger(scale, pieces[i]);
    scale = team.max(scale);
    if (!(scale > 0 && is_finite(scale))) scale = 1;
    double sum = 0;
    for (int64_t i = begin + team.rank; i < end; i += 32) {
      const double part = pieces[i] / scale;
      sum += part * part;
    }
    const double norm = scale * sqrt(team.sum(sum));
    if (team.rank != 0) continue;
    const int64_t column = s.column + segment;
    store_one(f.norms.data, f.norms.dtype, sample * f.columns + column, norm);
    if (!f.factors) continue;
    const double weight =
        f.weights.data ? load_one<double>(f.weights.data, f.weights.dtype, sample) : 1;
    f.factors[column * f.batch + sample] =
        weight == 0 ? 0 : weight * clip_factor(f.automatic, norm, s.bound[segment], f.gamma);
  }
}

// ---- Sums ----

// Threads `lane` of `lanes` have 16 bytes of a row each; the block's other threads have other
// samples, and meet in shared memory, [kThreads / lanes, lanes, elements].
template <class T>
__device__ void sum_tile(const T* grad, T* sum, int64_t width, int64_t tile, int64_t batch,
                         const double* factors, int lanes, double* held) {
  constexpr int kCount = 16 / int(sizeof(T)), kFlight = 4;
  const int lane = int(threadIdx.x) % lanes, group = int(threadIdx.x) / lanes;
  const int groups = kThreads / lanes;
  const int64_t begin = tile * lanes * kCount, column = begin + lane * kCount;
  const int64_t left = width - column;
  const bool vector = width % kCount == 0 && aligned(grad, 16);
  double total[kCount] = {};
  if (left > 0) {
    for (int64_t b = group; b < batch; b += kFlight * groups) {
      double factor[kFlight];
      Pack<T, kCount> rows[kFlight];
#pragma unroll
      for (int j = 0; j < kFlight; ++j) {
        const int64_t sample = b + j * groups;
        factor[j] = sample < batch ? factors[sample] : 0;
        // A sample that counts nothing is not looked at: it may hold a NaN.
        rows[j] = factor[j] != 0 ? raw_part<kCount>(grad + sample * width + column, left, vector)
                                 : Pack<T, kCount>{};
      }
#pragma unroll
      for (int j = 0; j < kFlight; ++j)
#pragma unroll
        for (int i = 0; i < kCount; ++i)
          total[i] = fused(factor[j], double(widen(rows[j].at[i])), total[i]);
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) held[int(threadIdx.x) * kCount + i] = total[i];
  __syncthreads();
  const int columns = lanes * kCount;
  for (int c = int(threadIdx.x); c < columns && begin + c < width; c += kThreads) {
    double value = 0;
    for (int g = 0; g < groups; ++g) value += held[g * columns + c];
    sum[begin + c] = Round<T>::nearest(value);
  }
  __syncthreads();  // before the next tile is written there
}

__global__ void __launch_bounds__(kThreads)
    clipped_sum_kernel(const __grid_constant__ Piece p, const double* factors, int64_t stride,
                       int lanes) {
  EMBATTLE_DYNAMIC_SHARED(shared);
  double* const held = reinterpret_cast<double*>(shared);
  for (int64_t tile = p.first[0] + blockIdx.x; tile < p.first[p.count]; tile += gridDim.x) {
    const int t = tensor_of(p, tile);
    const double* const own = factors + t * stride;
    const auto add = [&](auto tag) {
      using T = decltype(tag);
      sum_tile(static_cast<const T*>(p.grad[t]), static_cast<T*>(p.sum[t]), p.width[t],
               tile - p.first[t], p.batch, own, lanes, held);
    };
    switch (p.type[t]) {
      case Dtype::f32:
        add(float{});
        break;
      case Dtype::f64:
        add(double{});
        break;
      case Dtype::f16:
        add(Half{});
        break;
      case Dtype::bf16:
        add(BFloat16{});
        break;
    }
  }
}

// ---- Host ----

struct List {
  const SampleTensor* tensors;
  int64_t count, batch;

  int64_t longest() const {
    int64_t width = 0;
    for (int64_t t = 0; t < count; ++t) width = std::max(width, tensors[t].width);
    return width;
  }
  template <class Width>
  int64_t tiles(Width width) const {
    int64_t n = 0;
    for (int64_t t = 0; t < count; ++t) n += (tensors[t].width + width(t) - 1) / width(t);
    return n;
  }
  // f(piece, number of its first tensor) for all tensors, kMost at a time.
  template <class Width, class F>
  cudaError_t each_piece(Width width, F f) const {
    int64_t tile = 0;
    for (int64_t begin = 0; begin < count; begin += kMost) {
      Piece p{};
      p.batch = batch;
      p.count = int(std::min<int64_t>(kMost, count - begin));
      for (int i = 0; i < p.count; ++i) {
        const SampleTensor& t = tensors[begin + i];
        p.grad[i] = t.grad.data;
        p.sum[i] = t.sum.data;
        p.type[i] = t.grad.dtype;
        p.width[i] = t.width;
        p.first[i] = tile;
        tile += (t.width + width(begin + i) - 1) / width(begin + i);
      }
      p.first[p.count] = tile;
      const cudaError_t error = f(p, begin);
      if (error != cudaSuccess) return error;
    }
    return cudaSuccess;
  }
};

// Norms and, for clip_and_sum, factors and sums.
int run(const List& list, const Finish& wanted, const ClipArgs* clip, const Context& context) {
  Limits limits;
  cudaError_t error = Limits::of_current_device(&limits);
  if (error != cudaSuccess) return error;
  // Long rows are cut so that every warp of the device has work.
  int64_t tile = 8192;
  const auto tile_width = [&](int64_t) { return tile; };
  while (tile > 1024 && list.tiles(tile_width) * list.batch < int64_t(limits.multiprocessors) * 64)
    tile /= 2;
  Finish f = wanted;
  f.batch = list.batch;
  f.tiles = list.tiles(tile_width);
  const bool each = f.columns > 1 || (clip && clip->mode == ClipMode::per_layer);

  const size_t pieces = rounded(size_t(list.batch * f.tiles) * sizeof(double));
  const size_t factors = clip ? rounded(size_t(list.batch * f.columns) * sizeof(double)) : 0;
  unsigned char* workspace = nullptr;
  if (pieces + factors) {
    workspace = static_cast<unsigned char*>(context.allocate(context.self, pieces + factors));
    if (!workspace) return cudaErrorMemoryAllocation;
  }
  auto* const norms = reinterpret_cast<double*>(workspace);
  f.pieces = norms;
  f.factors = clip ? reinterpret_cast<double*>(workspace + pieces) : nullptr;

  const int lanes = power_of_two((std::min(tile, list.longest()) + 3) / 4, 32);
  const auto finish = [&](const Segments& s) {
    return enqueue(finish_kernel, (list.batch * s.count + kThreads / 32 - 1) / (kThreads / 32),
                   kThreads, 0, context, s, f);
  };
  error = list.each_piece(tile_width, [&](Piece& p, int64_t begin) {
    p.tile = tile;
    const int64_t units = (p.first[p.count] - p.first[0]) * list.batch;
    const int teams = kThreads / lanes;
    const cudaError_t failed = enqueue(piece_norm_kernel, (units + teams - 1) / teams, kThreads, 0,
                                       context, p, norms, f.tiles, lanes);
    if (failed != cudaSuccess || !each) return failed;
    Segments s{};
    s.count = p.count;
    s.column = begin;
    for (int i = 0; i <= p.count; ++i) s.first[i] = p.first[i];
    for (int i = 0; i < p.count; ++i) s.bound[i] = clip->max_norm[begin + i];
    return finish(s);
  });
  if (error == cudaSuccess && !each) {
    Segments s{};
    s.count = 1;
    s.first[1] = f.tiles;
    s.bound[0] = clip ? clip->max_norm[0] : 0;
    error = finish(s);
  }
  if (error != cudaSuccess || !clip) return error;

  // Fewer columns and more samples at once, until the device is full.
  int across = 32;
  const auto columns = [&](int64_t t) {
    return int64_t(across) * (16 / bytes_of(list.tensors[t].grad.dtype));
  };
  while (across > 8 && list.tiles(columns) < 4 * int64_t(limits.multiprocessors)) across /= 2;
  return list.each_piece(columns, [&](const Piece& p, int64_t begin) {
    return enqueue(clipped_sum_kernel, p.first[p.count] - p.first[0], kThreads,
                   kThreads * 8 * sizeof(double), context, p,
                   static_cast<const double*>(f.factors + (each ? begin * list.batch : 0)),
                   each ? list.batch : int64_t(0), across);
  });
}

}  // namespace

int per_sample_norm(const SampleNormArgs& args, const Context& context) {
  if (args.batch == 0) return cudaSuccess;
  Finish f;
  f.columns = 1;
  f.norms = args.norms;
  return run({args.tensors, args.count, args.batch}, f, nullptr, context);
}

int clip_and_sum(const ClipArgs& args, const Context& context) {
  Finish f;
  f.columns = args.mode == ClipMode::per_layer ? args.count : 1;
  f.norms = args.norms;
  f.weights = args.weights;
  f.automatic = args.mode == ClipMode::automatic;
  f.gamma = args.gamma;
  return run({args.tensors, args.count, args.batch}, f, &args, context);
}

}  // namespace embattle::cuda
