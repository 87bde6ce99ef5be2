// per_sample_norm and clip_and_sum.
//
// One kernel in three steps: norms of pieces of rows; the samples' norms and factors; the weighted
// sums over the batch by tiles of columns. A step needs all of the one before, so the blocks of the
// grid meet between them, in a cooperative launch. Steps are launches of their own where the device
// has none, and for the parts of a list of more than kMost tensors that share their norms.
//
// The first step goes through the list from its start, all samples of a tile after each other, and
// the last one from its end: it begins with what the second-level cache still has. Every sum is
// formed in an order that depends on shapes and the device alone.
#include "clip.cuh"
#include "launching.h"

namespace embattle::cuda {
namespace {

// Threads `lane` of `lanes` have 16 bytes of a row each; the block's other threads have other
// samples, and meet in shared memory, [elements, kThreads / lanes, lanes].
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
  for (int i = 0; i < kCount; ++i) held[i * kStride<kCount> + int(threadIdx.x)] = total[i];
  __syncthreads();
  const int columns = lanes * kCount;
  for (int c = int(threadIdx.x); c < columns && begin + c < width; c += kThreads) {
    double value = 0;
    const double* const own = held + c % kCount * kStride<kCount> + c / kCount;
    for (int g = 0; g < groups; ++g) value += own[g * lanes];
    sum[begin + c] = Round<T>::nearest(value);
  }
  __syncthreads();  // before the next tile is written there
}

__device__ __forceinline__ void take_sums(const Params& p, double* held) {
  const int64_t tiles = p.first_tile[p.count];
  for (int64_t at = blockIdx.x; at < tiles; at += gridDim.x) {
    const int64_t tile = tiles - 1 - at;
    const int t = tensor_of(p.first_tile, p.count, tile);
    const double* const factors = p.factors + (p.each ? (p.column + t) * p.batch : 0);
    const auto add = [&](auto tag) {
      using T = decltype(tag);
      sum_tile(static_cast<const T*>(p.grad[t]), static_cast<T*>(p.sum[t]), p.width[t],
               tile - p.first_tile[t], p.batch, factors, p.across, held);
    };
    for_type(p.type[t], add);
  }
}

// Steps from p.from to p.to; with several of them the launch is cooperative.
__global__ void __launch_bounds__(kThreads, 2) clip_kernel(const __grid_constant__ Params p) {
  EMBATTLE_DYNAMIC_SHARED(shared);
  if (p.from == Step::pieces) {
    take_pieces(p);
    if (p.to == Step::pieces) return;
    grid_sync();
  }
  if (p.from <= Step::factors) {
    take_factors(p);
    if (p.to == Step::factors) return;
    grid_sync();
  }
  take_sums(p, reinterpret_cast<double*>(shared));
}

// ---- Host ----

struct List {
  const SampleTensor* tensors;
  int64_t count, batch;

  int64_t packs_of(int64_t t) const {
    const int64_t pack = 16 / bytes_of(tensors[t].grad.dtype);
    return (tensors[t].width + pack - 1) / pack;
  }
  int64_t longest() const {
    int64_t packs = 0;
    for (int64_t t = 0; t < count; ++t) packs = std::max(packs, packs_of(t));
    return packs;
  }
  // How many stretches of so many packs a sample has.
  int64_t stretches(int64_t packs) const {
    int64_t n = 0;
    for (int64_t t = 0; t < count; ++t) n += (packs_of(t) + packs - 1) / packs;
    return n;
  }
};

struct Launcher {
  const List& list;
  const Limits& limits;
  const ClipArgs* clip;
  const Context& context;
  int64_t resident;  // blocks that the device has room for at once

  // One launch for the tensors from `begin` on, with all that does not depend on them in p.
  cudaError_t launch(Params p, int64_t begin, Step from, Step to) const {
    p.from = from;
    p.to = to;
    p.count = int(std::min<int64_t>(kMost, list.count - begin));
    p.column = p.each ? begin : 0;
    p.first_piece[0] = List{list.tensors, begin, list.batch}.stretches(p.piece);
    p.first_tile[0] = 0;
    int64_t most = p.each ? 0 : p.pieces_of_sample;  // pieces of a norm
    for (int i = 0; i < p.count; ++i) {
      const SampleTensor& t = list.tensors[begin + i];
      const int64_t packs = list.packs_of(begin + i);
      const int64_t pieces = (packs + p.piece - 1) / p.piece;
      p.grad[i] = t.grad.data;
      p.sum[i] = t.sum.data;
      p.type[i] = t.grad.dtype;
      p.width[i] = t.width;
      p.first_piece[i + 1] = p.first_piece[i] + pieces;
      p.first_tile[i + 1] = p.first_tile[i] + (packs + p.across - 1) / p.across;
      if (clip) p.bound[i] = clip->max_norm[p.each ? begin + i : 0];
      if (p.each) most = std::max(most, pieces);
    }
    p.finishers = power_of_two(most, 32);
    // As many blocks as the widest of the steps can use, and no more than are resident at once.
    const auto blocks = [](int64_t teams, int lanes) {
      return (teams * lanes + kThreads - 1) / kThreads;
    };
    const int64_t norms = p.batch * (p.each ? p.count : 1);
    int64_t grid = 1;
    if (from == Step::pieces)
      grid = std::max(grid, blocks((p.first_piece[p.count] - p.first_piece[0]) * p.batch, p.lanes));
    if (from <= Step::factors && to >= Step::factors)
      grid = std::max(grid, blocks(norms, p.finishers));
    if (to == Step::sums) grid = std::max(grid, p.first_tile[p.count]);
    const Meeting meeting{.grid = from != to};
    return enqueue(clip_kernel, std::min(grid, resident), kThreads, kShared, context, meeting, p);
  }

  // The same for steps that need nothing of other tensors: one launch, where there can be one.
  cudaError_t steps(const Params& p, int64_t begin, Step from, Step to) const {
    if (limits.cooperative) return launch(p, begin, from, to);
    cudaError_t error = cudaSuccess;
    for (int step = int(from); error == cudaSuccess && step <= int(to); ++step)
      error = launch(p, begin, Step(step), Step(step));
    return error;
  }
};

// Norms and, for clip_and_sum, factors and sums.
int run(const List& list, Params p, const ClipArgs* clip, const Context& context) {
  if (list.count == 0) return cudaSuccess;
  Limits limits;
  cudaError_t error = Limits::of_current_device(&limits);
  if (error != cudaSuccess) return error;
  int at_once = 0;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&at_once, clip_kernel, kThreads, kShared);
  if (error != cudaSuccess) return error;
  const int64_t resident = int64_t(std::max(at_once, 1)) * limits.multiprocessors;

  // Pieces short enough that every warp has work, but not so short that a sample has very many.
  p.batch = list.batch;
  const int64_t warps = resident * (kThreads / 32);
  while (p.piece > 32 && list.stretches(p.piece) * list.batch < 2 * warps) p.piece /= 2;
  while (p.piece < list.longest() && list.stretches(p.piece) > 2048) p.piece *= 2;
  p.lanes = power_of_two(std::min<int64_t>(p.piece, list.longest()), 32);
  p.pieces_of_sample = list.stretches(p.piece);
  // Fewer columns and more samples at once, until the device is full.
  while (p.across > 8 && list.stretches(p.across) < 2 * resident) p.across /= 2;

  const size_t pieces = rounded(size_t(list.batch * p.pieces_of_sample) * sizeof(double));
  const size_t factors = clip ? size_t(list.batch * p.columns) * sizeof(double) : 0;
  if (pieces + factors) {
    auto* const workspace =
        static_cast<unsigned char*>(context.allocate(context.self, pieces + factors));
    if (!workspace) return cudaErrorMemoryAllocation;
    p.pieces = reinterpret_cast<double*>(workspace);
    if (clip) p.factors = reinterpret_cast<double*>(workspace + pieces);
  }

  // Tensors with norms of their own, and the last ones, for which all pieces are there, take all
  // steps at once; those before have their pieces first and, from the end again, their sums last.
  const Launcher launcher{list, limits, clip, context, resident};
  const Step first = list.batch ? Step::pieces : Step::sums;
  const Step last = clip ? Step::sums : Step::factors;
  const int64_t end = (list.count - 1) / kMost * kMost;
  for (int64_t begin = 0; error == cudaSuccess && begin < end; begin += kMost)
    error = p.each           ? launcher.steps(p, begin, first, last)
            : list.batch > 0 ? launcher.launch(p, begin, Step::pieces, Step::pieces)
                             : cudaSuccess;
  if (error == cudaSuccess) error = launcher.steps(p, end, first, last);
  for (int64_t begin = end - kMost; clip && !p.each && error == cudaSuccess && begin >= 0;
       begin -= kMost)
    error = launcher.launch(p, begin, Step::sums, Step::sums);
  return error;
}

}  // namespace

int per_sample_norm(const SampleNormArgs& args, const Context& context) {
  if (args.batch == 0) return cudaSuccess;
  Params p;
  p.norms = args.norms;
  return run({args.tensors, args.count, args.batch}, p, nullptr, context);
}

int clip_and_sum(const ClipArgs& args, const Context& context) {
  Params p;
  p.each = args.mode == ClipMode::per_layer;
  p.columns = p.each ? args.count : 1;
  p.norms = args.norms;
  p.weights = args.weights;
  p.automatic = args.mode == ClipMode::automatic;
  p.gamma = args.gamma;
  return run({args.tensors, args.count, args.batch}, p, &args, context);
}

}  // namespace embattle::cuda
