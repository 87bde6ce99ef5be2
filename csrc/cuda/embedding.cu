// embedding_perturb, and embedding_grad_norm.
#include "rows.cuh"
#include "sort.cuh"
#include "team.cuh"

namespace embattle::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kMostPairs = 8192;  // of a sample, that shared memory holds
constexpr int kStep = 4;          // elements of a row that a thread has at once

// ---- embedding_perturb ----

struct PerturbParams {
  Rows weight, delta, out;
  const int64_t* indices = nullptr;
  const int64_t* inverse = nullptr;
  int64_t count = 0;
  int lanes = 32;  // of a row
};

// Some lanes of a warp for each row of the result.
template <class W>
__global__ void __launch_bounds__(256) perturb_kernel(const __grid_constant__ PerturbParams p) {
  constexpr int kCount = Rows::kStep<W>;
  const Lanes team(p.lanes);
  for (int64_t i = team.index; i < p.count; i += team.count) {
    const int64_t row = p.indices[i], moved = p.inverse[i];
    for (int64_t c = int64_t(team.rank) * kCount; c < p.out.dim; c += int64_t(team.size) * kCount) {
      auto pack = p.weight.raw<W>(row, c);
      if (moved >= 0) {
        const auto d = p.delta.load<kCount>(moved, c);
#pragma unroll
        for (int j = 0; j < kCount; ++j) pack[j] = nearest<W>(double(widen(pack[j])) + d[j]);
      }
      p.out.put(i, c, pack);
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

// ||sum of each run's rows, times unit||^2 added up: this thread's part. Lanes have columns, teams
// have runs.
template <class Runs>
__device__ double runs_square(const Runs& runs, const NormParams& p, int64_t start, double unit) {
  const int lane = int(threadIdx.x) % p.lanes, teams = kThreads / p.lanes;
  double sum = 0;
  for (int64_t i = int(threadIdx.x) / p.lanes; i < runs.count; i += teams) {
    if (!runs.head(i)) continue;
    for (int64_t c = int64_t(lane) * kStep; c < p.args.dim; c += int64_t(p.lanes) * kStep) {
      Pack<double, kStep> total{};
      for (int64_t j = i; runs.together(i, j); ++j) {
        const auto x = p.grad.load<kStep>(start + runs.positions[j], c);
#pragma unroll
        for (int e = 0; e < kStep; ++e) total[e] += x[e];
      }
#pragma unroll
      for (int e = 0; e < kStep; ++e) sum += total[e] * unit * (total[e] * unit);
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
    for (int64_t j = i; runs.together(i, j); ++j)
      weight += p.args.weights.data ? load_one<double>(p.args.weights.data, p.args.weights.dtype,
                                                       start + runs.positions[j])
                                    : 1;
    sum += weight * weight;
  }
  return sum;
}

// A block for each sample or bag.
__global__ void __launch_bounds__(kThreads)
    embedding_norm_kernel(const __grid_constant__ NormParams p) {
  EMBATTLE_DYNAMIC_SHARED(shared);
  const Shape shape{.lanes = kThreads};
  Team team(shape, shared);
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
      sort_pairs(k, at, pairs, [&](int i) {
        return i < n && indices[i] != a.padding ? (long long)indices[i] : kNoKey;
      });
      return SortedRuns<long long, int>{k, at, n};
    };
    const auto over_runs = [&](auto f) {
      return n <= p.pairs ? f(sorted(keys, positions))
                          : f(sorted(p.keys + 2 * start, p.positions + 2 * start));
    };
    const auto norm_by = [&](auto square) {
      return length(a.grad.dtype == Dtype::f64,
                    [&](double unit) { return team.sum(square(unit)); });
    };
    double norm = 0;
    if (!a.offsets) {
      norm = over_runs([&](const auto& r) {
        return norm_by([&](double unit) { return runs_square(r, p, start, unit); });
      });
    } else {
      Sums s;
      s.a = over_runs([&](const auto& r) { return weights_square(r, p, start); });
      for (int64_t i = threadIdx.x; i < n; i += kThreads) s.b += indices[i] != a.padding;
      s = team.agree(kSumA | kSumB, s);
      const double row = norm_by(
          [&](double unit) { return squares(p.grad, b, int(threadIdx.x), kThreads, unit); });
      norm = s.b == 0 ? 0 : row * sqrt(s.a);
      if (a.mean && s.b > 0) norm /= s.b;
    }
    if (threadIdx.x == 0) store_one(a.norms.data, a.norms.dtype, b, norm);
  }
}

}  // namespace

int embedding_perturb(const PerturbArgs& args, const Context& context) {
  if (args.dim == 0) return cudaSuccess;
  Queue queue(context);
  const int step = 16 / bytes_of(args.weight.dtype);
  const int lanes = power_of_two((args.dim + step - 1) / step, 32), teams = 256 / lanes;
  const PerturbParams p{Rows::of(args.weight, args.dim, step),
                        Rows::of(args.delta, args.dim, step),
                        Rows::of(args.out, args.dim, step),
                        args.indices,
                        args.inverse,
                        args.count,
                        lanes};
  for_type(args.weight.dtype, [&](auto tag) {
    queue.launch(perturb_kernel<decltype(tag)>, {(args.count + teams - 1) / teams, 256}, p);
  });
  return queue.error();
}

int embedding_grad_norm(const EmbeddingNormArgs& args, const Context& context) {
  if (args.batch == 0) return cudaSuccess;
  Queue queue(context);
  NormParams p;
  p.args = args;
  p.grad = Rows::of(args.grad, args.dim, kStep);
  p.lanes = power_of_two((args.dim + kStep - 1) / kStep, 32);
  // The lengths of bags are on the device: most are expected below four times the average. Longer
  // ones are sorted in global memory.
  const int64_t tokens = args.offsets ? 4 * (args.count / args.batch + 1) : args.tokens;
  const size_t most = size_t(queue.device(cudaDevAttrMaxSharedMemoryPerBlockOptin));
  p.pairs = power_of_two(tokens, kMostPairs);
  const auto shared = [&] {
    return sizeof(TeamScratch) + size_t(p.pairs) * (sizeof(long long) + sizeof(int));
  };
  while (p.pairs > 1 && shared() > most) p.pairs /= 2;
  const int64_t longest = args.offsets ? args.count : args.tokens;
  const int64_t all = args.offsets ? args.count : args.batch * args.tokens;
  const int64_t room = longest > p.pairs ? 2 * all : 0;
  queue.allocate(Array{&p.keys, room}, Array{&p.positions, room});
  queue.launch(embedding_norm_kernel, {args.batch, kThreads, shared()}, p);
  return queue.error();
}

}  // namespace embattle::cuda
