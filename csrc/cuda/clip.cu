// per_sample_norm and clip_and_sum.
//
// Two phases, each one launch for up to kMost tensors of the list: norms of pieces of rows and, by
// the block that is the last of a sample, the sample's norms and factors; then the weighted sums
// over the batch by tiles of columns. The second needs all factors, so it starts where the first
// has ended. Every sum is formed in an order that depends on shapes and the device alone.
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

// How samples and their tiles are spread over threads. All but the last are powers of two.
struct Spread {
  int lanes = 32;   // threads that work on a tile
  int teams = 1;    // of a sample in a block
  int samples = 1;  // of a block
  int blocks = 1;   // of a sample; the grid is a multiple of them
};

// What becomes of the norms of pieces: one norm for the whole list, or one for each tensor.
struct Finish {
  bool now = false;    // with these tensors: all pieces of what is to be summed are there
  bool each = false;   // a norm for each tensor
  int64_t column = 0;  // where in the norms the first one goes
  double bound[kMost] = {};
  int64_t tiles = 0, columns = 0;
  double* pieces = nullptr;     // [batch, tiles]
  Data norms;                   // [batch, columns]
  double* factors = nullptr;    // [columns, batch], or null: only norms are wanted
  ConstData weights;            // [batch] or absent
  unsigned* tickets = nullptr;  // [batch], zero: how many blocks of a sample are done
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

__device__ __forceinline__ double piece_norm(const Lanes& team, const Piece& p, int64_t sample,
                                             int64_t tile) {
  const int t = tensor_of(p, tile);
  const int64_t column = (tile - p.first[t]) * p.tile, width = p.width[t];
  const int64_t at = sample * width + column, n = smaller(p.tile, width - column);
  switch (p.type[t]) {
    case Dtype::f32:
      return norm_of(team, static_cast<const float*>(p.grad[t]) + at, n);
    case Dtype::f64:
      return norm_of(team, static_cast<const double*>(p.grad[t]) + at, n);
    case Dtype::f16:
      return norm_of(team, static_cast<const Half*>(p.grad[t]) + at, n);
    default:
      return norm_of(team, static_cast<const BFloat16*>(p.grad[t]) + at, n);
  }
}

// A sample's norm over tiles [begin, end), and its factor. The tiles' norms are read from the
// second-level cache: other blocks have just written them.
__device__ void finish_norm(const Lanes& team, const Finish& f, int64_t batch, int64_t sample,
                            int segment, int64_t begin, int64_t end) {
  const double* const pieces = f.pieces + sample * f.tiles;
  double scale = 0;
  for (int64_t i = begin + team.rank; i < end; i += team.size)
    scale = larger(scale, __ldcg(pieces + i));
  scale = team.max(scale);
  if (!(scale > 0 && is_finite(scale))) scale = 1;
  double sum = 0;
  for (int64_t i = begin + team.rank; i < end; i += team.size) {
    const double part = __ldcg(pieces + i) / scale;
    sum += part * part;
  }
  const double norm = scale * sqrt(team.sum(sum));
  if (team.rank != 0) return;
  const int64_t column = f.column + segment;
  store_one(f.norms.data, f.norms.dtype, sample * f.columns + column, norm);
  if (!f.factors) return;
  const double weight =
      f.weights.data ? load_one<double>(f.weights.data, f.weights.dtype, sample) : 1;
  f.factors[column * batch + sample] =
      weight == 0 ? 0 : weight * clip_factor(f.automatic, norm, f.bound[segment], f.gamma);
}

__global__ void __launch_bounds__(kThreads, 3)
    piece_norm_kernel(const __grid_constant__ Piece p, const __grid_constant__ Spread s,
                      const __grid_constant__ Finish f) {
  const Lanes team(s.lanes);
  // Those that finish: a sample's threads in the block, by the warp.
  const int own = s.lanes * s.teams, place = int(threadIdx.x) % own;
  const Lanes finisher(own < 32 ? own : 32);
  const int part = int(blockIdx.x) % s.blocks;
  const int64_t step = int64_t(int(gridDim.x) / s.blocks) * s.samples;
  for (int64_t begin = int64_t(int(blockIdx.x) / s.blocks) * s.samples; begin < p.batch;
       begin += step) {
    const int64_t sample = begin + int(threadIdx.x) / own;
    const bool here = sample < p.batch;
    if (here) {
      const int64_t first = p.first[0] + part * s.teams + place / s.lanes;
      for (int64_t tile = first; tile < p.first[p.count]; tile += int64_t(s.blocks) * s.teams) {
        const double norm = piece_norm(team, p, sample, tile);
        if (team.rank == 0) f.pieces[sample * f.tiles + tile] = norm;
      }
    }
    if (!f.now) continue;
    bool last = true;
    if (s.blocks > 1) {
      // Every block says that it is done after its pieces can be seen; the last one has all.
      __threadfence();
      __syncthreads();
      const bool mine =
          threadIdx.x == 0 && atomicAdd(f.tickets + sample, 1u) == unsigned(s.blocks - 1);
      last = __syncthreads_or(mine);
      __threadfence();
      if (mine) f.tickets[sample] = 0;  // for the next launch
    } else {
      __syncthreads();
    }
    if (!here || !last) continue;
    const int count = f.each ? p.count : 1;
    for (int i = place / finisher.size; i < count; i += own / finisher.size)
      finish_norm(finisher, f, p.batch, sample, i, f.each ? p.first[i] : 0,
                  f.each ? p.first[i + 1] : f.tiles);
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

// How the tiles of one launch, `own` of each sample, are spread over the device.
Spread spread_of(int lanes, int64_t own, int64_t batch, int64_t bytes, const Limits& limits) {
  Spread s;
  s.lanes = lanes;
  s.teams = power_of_two(own, kThreads / lanes);
  s.samples = kThreads / (lanes * s.teams);
  // Several blocks on a sample: enough to fill the device, and more where much is to be read, so
  // that none is long. They need a counter that starts at 0, which is one more thing to do.
  const int64_t wanted = int64_t(limits.multiprocessors) * (bytes < (int64_t(32) << 20) ? 2 : 8);
  if (s.samples == 1 && batch < wanted)
    s.blocks = int(std::min((own + s.teams - 1) / s.teams, (wanted + batch - 1) / batch));
  return s;
}

// Norms and, for clip_and_sum, factors and sums.
int run(const List& list, const Finish& wanted, const ClipArgs* clip, const Context& context) {
  Limits limits;
  cudaError_t error = Limits::of_current_device(&limits);
  if (error != cudaSuccess) return error;
  // Long rows are cut so that every warp of the device has work, but not so that the pieces of a
  // sample become many.
  int64_t tile = 8192;
  const auto tile_width = [&](int64_t) { return tile; };
  while (tile > 1024 && list.tiles(tile_width) * list.batch < int64_t(limits.multiprocessors) * 64)
    tile /= 2;
  while (tile < list.longest() && list.tiles(tile_width) > 2048) tile *= 2;
  const int lanes = power_of_two((std::min(tile, list.longest()) + 3) / 4, 32);
  const auto spread = [&](const Piece& p) {
    int64_t bytes = 0;
    for (int i = 0; i < p.count; ++i) bytes += p.batch * p.width[i] * bytes_of(p.type[i]);
    return spread_of(lanes, p.first[p.count] - p.first[0], p.batch, bytes, limits);
  };
  Finish f = wanted;
  f.tiles = list.tiles(tile_width);
  bool counted = false;
  list.each_piece(tile_width, [&](const Piece& p, int64_t) {
    counted |= spread(p).blocks > 1;
    return cudaSuccess;
  });

  const size_t pieces = rounded(size_t(list.batch * f.tiles) * sizeof(double));
  const size_t factors = clip ? rounded(size_t(list.batch * f.columns) * sizeof(double)) : 0;
  const size_t tickets = counted ? size_t(list.batch) * sizeof(unsigned) : 0;
  unsigned char* workspace = nullptr;
  if (pieces + factors + tickets) {
    workspace =
        static_cast<unsigned char*>(context.allocate(context.self, pieces + factors + tickets));
    if (!workspace) return cudaErrorMemoryAllocation;
  }
  f.pieces = reinterpret_cast<double*>(workspace);
  f.factors = clip ? reinterpret_cast<double*>(workspace + pieces) : nullptr;
  if (tickets) {
    f.tickets = reinterpret_cast<unsigned*>(workspace + pieces + factors);
    error = cudaMemsetAsync(f.tickets, 0, tickets, static_cast<cudaStream_t>(context.stream));
    if (error != cudaSuccess) return error;
  }

  error = list.each_piece(tile_width, [&](Piece& p, int64_t begin) {
    p.tile = tile;
    f.now = f.each || begin + p.count == list.count;
    f.column = f.each ? begin : 0;
    for (int i = 0; clip && i < (f.each ? p.count : 1); ++i)
      f.bound[i] = clip->max_norm[f.column + i];
    const Spread s = spread(p);
    return enqueue(piece_norm_kernel, (p.batch + s.samples - 1) / s.samples * s.blocks, kThreads, 0,
                   context, p, s, f);
  });
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
                   static_cast<const double*>(f.factors + (f.each ? begin * list.batch : 0)),
                   f.each ? list.batch : int64_t(0), across);
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
  f.each = args.mode == ClipMode::per_layer;
  f.columns = f.each ? args.count : 1;
  f.norms = args.norms;
  f.weights = args.weights;
  f.automatic = args.mode == ClipMode::automatic;
  f.gamma = args.gamma;
  return run({args.tensors, args.count, args.batch}, f, &args, context);
}

}  // namespace embattle::cuda
