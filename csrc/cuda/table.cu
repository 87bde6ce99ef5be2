// Sums of gradients by row of a table: the backward of embedding_perturb, embedding_grad_sum, and
// rowwise_adagrad_.
//
// The batch is sorted by row; some lanes of a warp have each run of equal rows, a whole block a
// long one. A row is summed in double and in the order of the batch (a long one in the block's
// shares), by one team: no atomics, the same bits every time.
#include "../formulas.h"
#include "rows.cuh"
#include "sort.cuh"
#include "team.cuh"

namespace embattle::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kLong = 64;   // items of a run that a block works on
constexpr int kFlight = 4;  // rows that a thread loads at once

struct TableParams {
  SortedIndices runs;
  Rows grad;
  Rows out;  // the sums, or the table
  int lanes = 32;
  // segment_sum only
  ConstData weights;            // of samples
  double samples_per_item = 1;  // the inverse of the tokens
  int64_t padding = -1;
  // rowwise_adagrad_ only
  Data state;
  double lr = 0, eps = 0, max_norm = 0;
};

// A run, as the threads that work on it see it; T is the gradient's element type. The weights cost
// registers: without them a kernel is one of its own.
template <class T, bool kWeighted>
struct Run {
  static constexpr int kStep = Rows::kStep<T>;

  const TableParams& p;
  const Lanes& team;  // the lanes that have a row's columns
  int64_t item;       // the run's first
  bool whole;         // the block works on it
  double* held;       // [teams][lanes][kStep], where the block's teams meet

  __device__ int64_t row() const { return p.runs.keys[item]; }
  __device__ int64_t width() const { return int64_t(p.lanes) * kStep; }
  // This thread's first column.
  __device__ int64_t column() const { return int64_t(team.rank) * kStep; }
  // Of the threads with the same columns, the one that writes.
  __device__ bool writes() const { return !whole || int(threadIdx.x) < p.lanes; }

  // The sums of columns [c, c + kStep). All threads of the run call it, also for columns beyond the
  // last.
  __device__ __forceinline__ Pack<double, kStep> total(int64_t c) const {
    const int teams = kThreads / p.lanes, own = int(threadIdx.x) / p.lanes;
    const int64_t stride = whole ? teams : 1;
    Pack<double, kStep> sum{};
    if (c < p.grad.dim) {
      bool more = true;
      for (int64_t i = item + (whole ? own : 0); more; i += kFlight * stride) {
        Pack<T, kStep> x[kFlight];
        double weight[kFlight];
#pragma unroll
        for (int f = 0; f < kFlight; ++f) {
          more = more && p.runs.together(item, i + f * stride);
          x[f] = more ? p.grad.raw<T>(p.runs.positions[i + f * stride], c) : Pack<T, kStep>{};
          weight[f] = kWeighted && more ? weight_of(p.runs.positions[i + f * stride]) : 1;
        }
#pragma unroll
        for (int f = 0; f < kFlight; ++f)
#pragma unroll
          for (int e = 0; e < kStep; ++e) sum[e] += weight[f] * double(widen(x[f][e]));
      }
    }
    if (!whole) return sum;
#pragma unroll
    for (int e = 0; e < kStep; ++e) held[threadIdx.x * kStep + e] = sum[e];
    __syncthreads();
#pragma unroll
    for (int e = 0; e < kStep; ++e) {
      sum[e] = 0;
      for (int t = 0; t < teams; ++t) sum[e] += held[(t * p.lanes + team.rank) * kStep + e];
    }
    __syncthreads();
    return sum;
  }

  // What these threads have read before has been read by all of them.
  __device__ void sync() const {
    if (whole)
      __syncthreads();
    else
      team.sync();
  }

  // The sample is the quotient by the tokens: half an item keeps what comes out further from whole
  // numbers than rounding moves it, below 2^50 items. A division of integers would be a call.
  __device__ __forceinline__ double weight_of(int64_t position) const {
    const auto sample = int64_t((double(position) + 0.5) * p.samples_per_item);
    return load_one<double>(p.weights.data, p.weights.dtype, sample);
  }
};

// f(run) for every run. All threads of the block call it.
template <class Run, class F>
__device__ __forceinline__ void each_run(const TableParams& p, F f) {
  EMBATTLE_DYNAMIC_SHARED(shared);
  const Lanes team(p.lanes);
  const int teams = kThreads / p.lanes;
  const SortedIndices& runs = p.runs;
  const auto is_long = [&](int64_t i) { return runs.together(i, i + kLong - 1); };
  for (int64_t begin = int64_t(blockIdx.x) * teams; begin < runs.count;
       begin += int64_t(gridDim.x) * teams) {
    const int64_t own = begin + int(threadIdx.x) / p.lanes;
    const bool head = own < runs.count && runs.head(own), for_block = head && is_long(own);
    // First every team its own run, then the block the long ones, one after another.
    const int64_t end = smaller(begin + teams, runs.count);
    for (int64_t i = begin - 1; i < end; ++i) {
      const bool alone = i < begin;
      if (alone ? head && !for_block : runs.head(i) && is_long(i))
        f(Run{p, team, alone ? own : i, !alone, reinterpret_cast<double*>(shared)});
      if (alone && !__syncthreads_or(for_block)) break;
    }
  }
}

// Two blocks on a multiprocessor: left to itself, the compiler makes room for more, and spills.
template <class T, bool kWeighted>
__global__ void __launch_bounds__(kThreads, kWeighted ? 2 : 0)
    segment_sum_kernel(const __grid_constant__ TableParams p) {
  using Run = Run<T, kWeighted>;
  each_run<Run>(p, [&](const Run& run) {
    if (run.row() == p.padding) return;  // all threads of the run
    for (int64_t c = run.column(); c - run.column() < p.grad.dim; c += run.width()) {
      const auto sum = run.total(c);
      if (run.writes() && c < p.grad.dim) p.out.put(run.row(), c, narrowed<T>(sum));
    }
  });
}

template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    adagrad_kernel(const __grid_constant__ TableParams p) {
  using Run = Run<T, false>;
  constexpr int kStep = Run::kStep;
  each_run<Run>(p, [&](const Run& run) {
    Pack<double, kStep> sum{};
    const bool kept = p.grad.dim <= run.width();  // the sums stay where they are
    bool again = false;
    const double norm = length(sizeof(T) == 8, [&](double unit) {
      double square = 0;
      for (int64_t c = run.column(); c - run.column() < p.grad.dim; c += run.width()) {
        if (!again || !kept) sum = run.total(c);
#pragma unroll
        for (int e = 0; e < kStep; ++e) square += sum[e] * unit * (sum[e] * unit);
      }
      again = true;
      return run.team.sum(square);
    });
    if (!is_finite(norm)) return;  // one bad sample must not destroy a row
    const int64_t row = run.row();
    const double factor = norm > p.max_norm ? p.max_norm / norm : 1;
    const double length = factor * norm;
    const double mean = p.grad.dim > 0 ? length * length / double(p.grad.dim) : 0;
    const double state = load_one<double>(p.state.data, p.state.dtype, row) + mean;
    const double step = adagrad_step(p.lr, factor, sqrt(state), p.eps);
    run.sync();  // before the state is written
    if (run.writes() && run.column() == 0) store_one(p.state.data, p.state.dtype, row, state);
    for (int64_t c = run.column(); c - run.column() < p.grad.dim; c += run.width()) {
      if (!kept) sum = run.total(c);
      if (!run.writes() || c >= p.grad.dim) continue;
      auto weight = p.out.load<kStep>(row, c);
#pragma unroll
      for (int e = 0; e < kStep; ++e) weight[e] -= step * sum[e];
      p.out.store(row, c, weight);
    }
  });
}

// The gradient, and the table or the sums in steps of as many elements.
TableParams params_of(const ConstData& grad, const Data& out, int64_t dim) {
  const int step = 16 / bytes_of(grad.dtype);
  TableParams p;
  p.grad = Rows::of(grad, dim, step);
  p.out = Rows::of(out, dim, step);
  p.lanes = power_of_two((dim + step - 1) / step, 32);
  return p;
}

int run(TableParams& p, void (*kernel)(TableParams), const int64_t* indices, int64_t rows,
        int64_t count, Queue& queue) {
  p.runs = sort_indices(indices, count, rows, queue);
  const int teams = kThreads / p.lanes, step = 16 / bytes_of(p.grad.type);
  queue.launch(kernel, {(count + teams - 1) / teams, kThreads, kThreads * step * sizeof(double)},
               p);
  return queue.error();
}

}  // namespace

int segment_sum(const SegmentSumArgs& args, const Context& context) {
  const size_t bytes = size_t(args.rows * args.dim) * size_t(bytes_of(args.out.dtype));
  if (bytes == 0) return cudaSuccess;
  Queue queue(context);
  queue.clear(args.out.data, bytes);  // all bits zero is the number zero in every dtype
  TableParams p = params_of(args.grad, args.out, args.dim);
  p.weights = args.weights;
  p.samples_per_item = 1 / double(args.tokens);
  p.padding = args.padding;
  const auto kernel = for_type(args.grad.dtype, [&]<class T>(T) {
    return args.weights.data ? segment_sum_kernel<T, true> : segment_sum_kernel<T, false>;
  });
  return run(p, kernel, args.inverse, args.rows, args.count, queue);
}

int rowwise_adagrad(const AdagradArgs& args, const Context& context) {
  Queue queue(context);
  TableParams p = params_of(args.grad, args.weight, args.dim);
  p.state = args.state;
  p.lr = args.lr;
  p.eps = args.eps;
  p.max_norm = args.max_norm;
  const auto kernel = for_type(args.grad.dtype, []<class T>(T) { return adagrad_kernel<T>; });
  return run(p, kernel, args.indices, args.rows, args.count, queue);
}

}  // namespace embattle::cuda
