// embedding_perturb, and embedding_grad_norm.
#include "launching.h"
#include "rows.cuh"
#include "runs.cuh"
#include "team.cuh"

namespace embattle::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kMostPairs = 8192;  // of a sample, that shared memory holds
constexpr int kStep = 4;          // elements of a row that a thread has at once

// ---- embedding_perturb ----

// Some lanes of a warp for each row of the result.
template <class W>
__global__ void __launch_bounds__(256) perturb_kernel(const __grid_constant__ PerturbArgs p,
                                                      bool vector, bool delta_vector, int lanes) {
  constexpr int kCount = 16 / int(sizeof(W));
  const W* const weight = static_cast<const W*>(p.weight.data);
  W* const out = static_cast<W*>(p.out.data);
  const int lane = int(threadIdx.x) % lanes, teams = int(blockDim.x) / lanes;
  for (int64_t i = blockIdx.x * int64_t(teams) + threadIdx.x / lanes; i < p.count;
       i += gridDim.x * int64_t(teams)) {
    const int64_t row = p.indices[i], moved = p.inverse[i];
    for (int64_t c = int64_t(lane) * kCount; c < p.dim; c += int64_t(lanes) * kCount) {
      const int64_t left = p.dim - c;
      Pack<W, kCount> pack = raw_part<kCount>(weight + row * p.dim + c, left, vector);
      if (moved >= 0) {
        double d[kCount];
        load_part(p.delta.data, p.delta.dtype, moved * p.dim + c, left, delta_vector, d);
#pragma unroll
        for (int j = 0; j < kCount; ++j)
          pack.at[j] = Round<W>::nearest(double(widen(pack.at[j])) + d[j]);
      }
      W* const to = out + i * p.dim + c;
      if (vector) {
        *reinterpret_cast<Pack<W, kCount>*>(to) = pack;
      } else {
#pragma unroll
        for (int j = 0; j < kCount; ++j)
          if (j < left) to[j] = pack.at[j];
      }
    }
  }
}

// ---- embedding_grad_norm ----

struct NormParams {
  EmbeddingNormArgs args;
  Rows grad;
  int pairs = 0;   // that shared memory holds; a power of two
  int lanes = 32;  // of a run
  // For longer samples, whose pairs are sorted in global memory, there is room for twice the
  // indices: a sample has its own from twice its first index on.
  long long* keys = nullptr;
  int* positions = nullptr;
};

// What squares are multiplied by where they leave the range of doubles, as float64 ones may;
// else 1.
__device__ __forceinline__ double unit_for(const Sums& s) {
  if ((s.a > 1e-280 && s.a < 1e280) || !(s.m > 0 && s.m < __builtin_huge_val())) return 1;
  return s.m < 1 ? 0x1p600 : 0x1p-600;
}

// This thread's part of: a: ||sum of each run's rows, times unit||^2 added up; m: the largest of
// their elements. Lanes have columns, teams have runs.
template <class Runs>
__device__ Sums runs_square(const Runs& runs, const NormParams& p, int64_t start, double unit) {
  const int lane = int(threadIdx.x) % p.lanes, teams = kThreads / p.lanes;
  Sums sum;
  for (int64_t i = int(threadIdx.x) / p.lanes; i < runs.count; i += teams) {
    if (!runs.head(i)) continue;
    for (int64_t c = int64_t(lane) * kStep; c < p.args.dim; c += int64_t(p.lanes) * kStep) {
      double total[kStep] = {}, x[kStep];
      for (int64_t j = i; j >= 0; j = runs.next(j)) {
        p.grad.load(start + runs.position(j), c, x);
#pragma unroll
        for (int e = 0; e < kStep; ++e) total[e] += x[e];
      }
#pragma unroll
      for (int e = 0; e < kStep; ++e) {
        sum.a += total[e] * unit * (total[e] * unit);
        sum.m = larger(sum.m, magnitude(total[e]));
      }
    }
  }
  return sum;
}

// The same of row b.
__device__ __forceinline__ Sums row_square(const NormParams& p, int64_t b, double unit) {
  Sums sum;
  for (int64_t c = int64_t(threadIdx.x) * kStep; c < p.args.dim; c += kThreads * kStep) {
    double x[kStep];
    p.grad.load(b, c, x);
#pragma unroll
    for (int e = 0; e < kStep; ++e) {
      sum.a += x[e] * unit * (x[e] * unit);
      sum.m = larger(sum.m, magnitude(x[e]));
    }
  }
  return sum;
}

// (sum of a run's weights)^2 added up: this thread's part.
template <class Runs>
__device__ double weights_square(const Runs& runs, const NormParams& p, int64_t start) {
  double sum = 0;
  for (int64_t i = threadIdx.x; i < runs.count; i += kThreads) {
    if (!runs.head(i)) continue;
    double weight = 0;
    for (int64_t j = i; j >= 0; j = runs.next(j))
      weight += p.args.weights.data ? load_one<double>(p.args.weights.data, p.args.weights.dtype,
                                                       start + runs.position(j))
                                    : 1;
    sum += weight * weight;
  }
  return sum;
}

// A block for each sample or bag.
__global__ void __launch_bounds__(kThreads)
    embedding_norm_kernel(const __grid_constant__ NormParams p) {
  EMBATTLE_DYNAMIC_SHARED(shared);
  Shape shape;
  shape.lanes = kThreads;
  Team team(shape, reinterpret_cast<TeamScratch*>(shared), nullptr, nullptr);
  auto* const keys = reinterpret_cast<long long*>(shared + sizeof(TeamScratch));
  int* const positions = reinterpret_cast<int*>(keys + p.pairs);
  const EmbeddingNormArgs& a = p.args;
  for (int64_t b = blockIdx.x; b < a.batch; b += gridDim.x) {
    int64_t start = b * a.tokens, n = a.tokens;
    if (a.offsets) {
      start = a.offsets[b];
      n = (b + 1 < a.batch || a.closed ? a.offsets[b + 1] : a.count) - start;
    }
    const int64_t* const indices = a.indices + start;
    const auto sorted = [&](long long* k, int* at) {
      int pairs = 1;
      while (pairs < n) pairs *= 2;
      __syncthreads();  // the sample before has been read
      for (int i = int(threadIdx.x); i < pairs; i += kThreads) {
        k[i] = i < n && indices[i] != a.padding ? (long long)indices[i] : kNoKey;
        at[i] = i;
      }
      sort_pairs(k, at, pairs);
      return SortedRuns<long long, int>{k, at, n};
    };
    const auto over_runs = [&](auto f) {
      return n <= p.pairs ? f(sorted(keys, positions))
                          : f(sorted(p.keys + 2 * start, p.positions + 2 * start));
    };
    // A norm by f(unit), its square times unit^2 and its largest element.
    const auto length = [&](auto f) {
      Sums s = team.agree(kSumA | kMax, f(1.0));
      const double unit = a.grad.dtype == Dtype::f64 ? unit_for(s) : 1;
      if (unit != 1) s = team.agree(kSumA, f(unit));
      return sqrt(s.a) / unit;
    };
    double norm = 0;
    if (!a.offsets) {
      norm = over_runs([&](const auto& r) {
        return length([&](double unit) { return runs_square(r, p, start, unit); });
      });
    } else {
      Sums s;
      s.a = over_runs([&](const auto& r) { return weights_square(r, p, start); });
      for (int64_t i = threadIdx.x; i < n; i += kThreads) s.b += indices[i] != a.padding;
      s = team.agree(kSumA | kSumB, s);
      const double row = length([&](double unit) { return row_square(p, b, unit); });
      norm = s.b == 0 ? 0 : row * sqrt(s.a);
      if (a.mean && s.b > 0) norm /= s.b;
    }
    if (threadIdx.x == 0) store_one(a.norms.data, a.norms.dtype, b, norm);
  }
}

}  // namespace

int embedding_perturb(const PerturbArgs& args, const Context& context) {
  if (args.count == 0 || args.dim == 0) return cudaSuccess;
  return with_type(args.weight.dtype, [&](auto tag) {
    using W = decltype(tag);
    constexpr int kCount = 16 / int(sizeof(W));
    const bool whole = args.dim % kCount == 0;
    const bool vector = whole && aligned(args.weight.data, 16) && aligned(args.out.data, 16);
    const int lanes = power_of_two((args.dim + kCount - 1) / kCount, 32), teams = 256 / lanes;
    const bool delta_vector =
        whole &&
        aligned(args.delta.data, size_t(std::min(16, kCount * bytes_of(args.delta.dtype))));
    return enqueue(perturb_kernel<W>, (args.count + teams - 1) / teams, 256, 0, context, args,
                   vector, delta_vector, lanes);
  });
}

int embedding_grad_norm(const EmbeddingNormArgs& args, const Context& context) {
  if (args.batch == 0) return cudaSuccess;
  NormParams p;
  p.args = args;
  p.grad = Rows::of(args.grad.data, args.grad.dtype, args.dim, kStep);
  p.lanes = power_of_two((args.dim + kStep - 1) / kStep, 32);
  // The lengths of bags are on the device: most are expected below four times the average. Longer
  // ones are sorted in global memory.
  const int64_t tokens = args.offsets ? 4 * (args.count / args.batch + 1) : args.tokens;
  Limits limits;
  const cudaError_t error = Limits::of_current_device(&limits);
  if (error != cudaSuccess) return error;
  p.pairs = power_of_two(tokens, kMostPairs);
  const auto shared = [&] {
    return sizeof(TeamScratch) + size_t(p.pairs) * (sizeof(long long) + sizeof(int));
  };
  while (p.pairs > 1 && shared() > size_t(limits.shared_per_block)) p.pairs /= 2;
  const int64_t longest = args.offsets ? args.count : args.tokens;
  if (longest > p.pairs) {
    const size_t room = 2 * size_t(args.offsets ? args.count : args.batch * args.tokens);
    const size_t keys = rounded(room * sizeof(long long));
    auto* const workspace = static_cast<unsigned char*>(
        context.allocate(context.self, keys + rounded(room * sizeof(int))));
    if (!workspace) return cudaErrorMemoryAllocation;
    p.keys = reinterpret_cast<long long*>(workspace);
    p.positions = reinterpret_cast<int*>(workspace + keys);
  }
  return enqueue(embedding_norm_kernel, args.batch, kThreads, shared(), context, p);
}

}  // namespace embattle::cuda
