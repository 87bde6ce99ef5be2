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
#include "../formulas.h"
#include "../launch_clip.h"
#include "launching.h"
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

// The sum of x[0, n)'s squares, times unit^2.
template <class T>
__device__ double squares(const Lanes& team, const T* x, int64_t n, double unit) {
  constexpr int kCount = 16 / int(sizeof(T));
  const int64_t full = n / kCount;
  double sum = 0;
  const auto add = [&](const Pack<T, kCount>& pack) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const double v = double(widen(pack[i])) * unit;
      sum += v * v;
    }
  };
  // Eight loads are under way before the first is added. Left to itself, the compiler may ask
  // between them whether there is a next one, and wait.
  constexpr int kLoads = 8;
  const bool vector = aligned(x, 16);
  const int64_t step = kLoads * team.size;
  int64_t c = team.rank;
  for (; vector && c + step - team.size < full; c += step) {
    Pack<T, kCount> packs[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) packs[i] = load_pack<kCount>(x + (c + i * team.size) * kCount);
#pragma unroll
    for (int i = 0; i < kLoads; ++i) add(packs[i]);
  }
#pragma unroll 2
  for (; c < full; c += team.size) add(load_part<kCount>(x + c * kCount, kCount, vector));
  if (full * kCount < n && full % team.size == team.rank)
    add(load_part<kCount>(x + full * kCount, n - full * kCount, false));
  return team.sum(sum);
}

template <class T>
__device__ double norm_of(const Lanes& team, const T* x, int64_t n) {
  return length(sizeof(T) == 8, [&](double unit) { return squares(team, x, n, unit); });
}

__device__ __forceinline__ void take_pieces(const Params& p) {
  const Lanes team(p.lanes);
  const int64_t step = team.count / p.batch, rest = team.count % p.batch;
  int64_t piece = p.first_piece[0] + team.index / p.batch, sample = team.index % p.batch;
  while (piece < p.first_piece[p.count]) {
    const int t = tensor_of(p.first_piece, p.count, piece);
    const double norm = for_type(p.type[t], [&]<class T>(T) {
      const int64_t elements = p.piece * (16 / int64_t(sizeof(T)));
      const int64_t column = (piece - p.first_piece[t]) * elements, width = p.width[t];
      const T* const x = static_cast<const T*>(p.grad[t]) + sample * width + column;
      return norm_of(team, x, smaller(elements, width - column));
    });
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
  return length(true, [&](double unit) {
    double sum = 0;
#pragma unroll 4
    for (int64_t i = begin + team.rank; i < end; i += team.size) {
      const double part = __ldcg(pieces + i) * unit;
      sum += part * part;
    }
    return team.sum(sum);
  });
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
        rows[j] = factor[j] != 0 ? load_part<kCount>(grad + sample * width + column, left, vector)
                                 : Pack<T, kCount>{};
      }
#pragma unroll
      for (int j = 0; j < kFlight; ++j)
#pragma unroll
        for (int i = 0; i < kCount; ++i)
          total[i] = fused(factor[j], double(widen(rows[j][i])), total[i]);
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
    sum[begin + c] = nearest<T>(value);
  }
  __syncthreads();  // before the next tile is written there
}

__device__ __forceinline__ void take_sums(const Params& p, double* held) {
  const int64_t tiles = p.first_tile[p.count];
  for (int64_t at = blockIdx.x; at < tiles; at += gridDim.x) {
    const int64_t tile = tiles - 1 - at;
    const int t = tensor_of(p.first_tile, p.count, tile);
    const double* const factors = p.factors + (p.each ? (p.column + t) * p.batch : 0);
    for_type(p.type[t], [&]<class T>(T) {
      sum_tile(static_cast<const T*>(p.grad[t]), static_cast<T*>(p.sum[t]), p.width[t],
               tile - p.first_tile[t], p.batch, factors, p.across, held);
    });
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

// What the launches of a list have in common.
struct Launcher {
  const List& list;
  const ClipArgs* clip;
  Queue& queue;
  bool cooperative;  // whether the device has such launches
  int64_t resident;  // blocks that the device has room for at once

  // Steps for the tensors from `begin` on, with all that does not depend on them in p.
  void launch(Params p, int64_t begin, Step from, Step to) const {
    if (from != to && !cooperative) {  // each in a launch of its own
      for (int step = int(from); step <= int(to); ++step) launch(p, begin, Step(step), Step(step));
      return;
    }
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
    queue.launch(clip_kernel, {std::min(grid, resident), kThreads, kShared, 1, from != to}, p);
  }
};

// Norms and, for clip_and_sum, factors and sums.
int run(const List& list, Params p, const ClipArgs* clip, const Context& context) {
  if (list.count == 0) return cudaSuccess;
  Queue queue(context);
  const int64_t multiprocessors = queue.device(cudaDevAttrMultiProcessorCount);
  int at_once = 0;
  queue.note(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&at_once, clip_kernel, kThreads, kShared));
  const int64_t resident = std::max(at_once, 1) * multiprocessors;

  // Pieces short enough that every warp has work, but not so short that a sample has very many.
  p.batch = list.batch;
  const int64_t warps = resident * (kThreads / 32);
  while (p.piece > 32 && list.stretches(p.piece) * list.batch < 2 * warps) p.piece /= 2;
  while (p.piece < list.longest() && list.stretches(p.piece) > 2048) p.piece *= 2;
  p.lanes = power_of_two(std::min<int64_t>(p.piece, list.longest()), 32);
  p.pieces_of_sample = list.stretches(p.piece);
  // Fewer columns and more samples at once, until the device is full.
  while (p.across > 8 && list.stretches(p.across) < 2 * resident) p.across /= 2;
  queue.allocate(Array{&p.pieces, list.batch * p.pieces_of_sample},
                 Array{&p.factors, clip ? list.batch * p.columns : 0});

  // Tensors with norms of their own, and the last ones, for which all pieces are there, take all
  // steps at once; those before have their pieces first and, from the end again, their sums last.
  const Launcher launcher{list, clip, queue, queue.device(cudaDevAttrCooperativeLaunch) != 0,
                          resident};
  const Step first = list.batch ? Step::pieces : Step::sums;
  const Step last = clip ? Step::sums : Step::factors;
  const int64_t end = (list.count - 1) / kMost * kMost;
  for (int64_t begin = 0; begin < end; begin += kMost)
    if (p.each || list.batch) launcher.launch(p, begin, first, p.each ? last : Step::pieces);
  launcher.launch(p, end, first, last);
  for (int64_t begin = end - kMost; clip && !p.each && begin >= 0; begin -= kMost)
    launcher.launch(p, begin, Step::sums, Step::sums);
  return queue.error();
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
