// linear_grad_norm: per-sample norms of a linear layer's weight gradient W_b = A_b^T G_b, without
// W_b in memory. A bias is one more input that is always 1.
//
//   Gram form:   ||W||^2 = sum_{t,s} <a_t, a_s> <g_t, g_s>
//   direct form: W in tiles of registers, squared and dropped
//
// Both run in float for float and half inputs. Rounding errors are relative to the trace,
// sum_t ||a_t||^2 ||g_t||^2, which a first kernel takes in double: where the result is far smaller,
// tokens cancel, and two more launches, in which all other samples return at once, take the direct
// form in double.
#include "../formulas.h"
#include "launching.h"
#include "rows.cuh"
#include "team.cuh"

namespace embattle::cuda {
namespace {

constexpr int kTile = 32;     // tokens or columns of a tile's side
constexpr int kDepth = 16;    // of what is summed over, in shared memory at once
constexpr int kSide = 4;      // of what a thread has of a tile
constexpr int kThreads = 64;  // (kTile / kSide)^2

struct LinearParams {
  LinearNormArgs args;
  Rows input, grad;    // of all tokens
  int64_t splits = 1;  // blocks of a sample
  // [batch, tokens]; with the sign bit where what is computed in cannot hold such numbers.
  double* traces = nullptr;
  double* partial = nullptr;      // [batch, splits]
  unsigned char* redo = nullptr;  // [batch]: tokens cancel
  double* scales = nullptr;       // [batch, 2]: of the second time, powers of two; or null: 1
  bool wide = false;              // in double
  bool tiled = false;             // there are partials; else the trace is the result
  bool exact = false;             // tokens that cancel do no harm
  bool second = false;            // the second time: only samples with redo
};

// ---- The trace ----

// A warp for each token.
__global__ void __launch_bounds__(256) trace_kernel(const __grid_constant__ LinearParams p) {
  const Lanes team(32);
  const LinearNormArgs& a = p.args;
  // Of doubles a sum of zero may be of squares that have vanished.
  const auto moderate = [&](double x, int64_t n) {
    return p.wide ? (x > 1e-140 && x < 1e+140) || n == 0 : x == 0 || (x > 1e-25 && x < 1e+30);
  };
  for (int64_t token = team.index; token < a.batch * a.tokens; token += team.count) {
    const double in = team.sum(squares(p.input, token, team.rank, 32));
    const double out = team.sum(squares(p.grad, token, team.rank, 32));
    const double product = (in + (a.bias ? 1 : 0)) * out;
    const bool holds = moderate(in, a.inputs) && moderate(out, a.outputs);
    // Not -product: a NaN, of infinite sums beside zeros, has a sign of its own.
    if (team.rank == 0) p.traces[token] = holds ? product : copysign(product, -1.0);
  }
}

// ---- Tiles ----

// sum[i][j] = sum over k of x(k, row i) y(k, row j), for this thread's rows. x and y give elements
// by (k, row of the tile). shared: [2][kDepth][kTile + 1]. All threads of the block call it.
template <class C, class X, class Y>
__device__ __forceinline__ void products(int64_t depth, bool along, X x, Y y, C* shared,
                                         C (&sum)[kSide][kSide]) {
  C* const left = shared;
  C* const right = shared + kDepth * (kTile + 1);
  const int row = int(threadIdx.x) / (kTile / kSide) * kSide;
  const int column = int(threadIdx.x) % (kTile / kSide) * kSide;
#pragma unroll
  for (int i = 0; i < kSide; ++i)
#pragma unroll
    for (int j = 0; j < kSide; ++j) sum[i][j] = 0;
  for (int64_t begin = 0; begin < depth; begin += kDepth) {
    __syncthreads();  // the last tile has been read
    // `along`: elements with neighbouring k are neighbours in memory; else those of neighbour rows.
#pragma unroll
    for (int n = int(threadIdx.x); n < kDepth * kTile; n += kThreads) {
      const int k = along ? n % kDepth : n / kTile, r = along ? n / kDepth : n % kTile;
      const bool there = begin + k < depth;
      left[k * (kTile + 1) + r] = there ? x(begin + k, r) : C(0);
      right[k * (kTile + 1) + r] = there ? y(begin + k, r) : C(0);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      C u[kSide], v[kSide];
#pragma unroll
      for (int i = 0; i < kSide; ++i) u[i] = left[k * (kTile + 1) + row + i];
#pragma unroll
      for (int j = 0; j < kSide; ++j) v[j] = right[k * (kTile + 1) + column + j];
#pragma unroll
      for (int i = 0; i < kSide; ++i)
#pragma unroll
        for (int j = 0; j < kSide; ++j) sum[i][j] = fused(u[i], v[j], sum[i][j]);
    }
  }
}

// The tile's share of the squared norm, of this thread. Tiles of the Gram form: pairs with s <= t.
template <class C, bool kGram>
__device__ double tile_square(const LinearParams& p, int64_t sample, int64_t tile, C* shared) {
  const LinearNormArgs& a = p.args;
  const int64_t inputs = a.inputs + (a.bias ? 1 : 0);
  const auto scaled = [&](int which, C x) {
    if constexpr (sizeof(C) == 8 && !kGram)
      if (p.second && p.scales) x *= p.scales[2 * sample + which];
    return x;
  };
  const auto input = [&](int64_t token, int64_t i) {
    if (token >= a.tokens || i >= inputs) return C(0);
    return scaled(0, i == a.inputs ? C(1) : p.input.at<C>(sample * a.tokens + token, i));
  };
  const auto grad = [&](int64_t token, int64_t o) {
    if (token >= a.tokens || o >= a.outputs) return C(0);
    return scaled(1, p.grad.at<C>(sample * a.tokens + token, o));
  };
  const auto dot = [](const C(&x)[kSide][kSide], const C(&y)[kSide][kSide]) {
    double sum = 0;
#pragma unroll
    for (int i = 0; i < kSide; ++i)
#pragma unroll
      for (int j = 0; j < kSide; ++j) sum += double(x[i][j]) * double(y[i][j]);
    return sum;
  };
  C first[kSide][kSide];
  if constexpr (kGram) {
    // Tile number -> (t, s): tiles (0,0) (1,0) (1,1) (2,0) ...
    int64_t t = int64_t((sqrt(8.0 * double(tile) + 1) - 1) / 2);
    while (t * (t + 1) / 2 > tile) --t;
    while ((t + 1) * (t + 2) / 2 <= tile) ++t;
    const int64_t s = tile - t * (t + 1) / 2;
    C second[kSide][kSide];
    products<C>(
        inputs, true, [&](int64_t k, int r) { return input(t * kTile + r, k); },
        [&](int64_t k, int r) { return input(s * kTile + r, k); }, shared, first);
    products<C>(
        a.outputs, true, [&](int64_t k, int r) { return grad(t * kTile + r, k); },
        [&](int64_t k, int r) { return grad(s * kTile + r, k); }, shared, second);
    return (t == s ? 1 : 2) * dot(first, second);
  } else {
    const int64_t across = (a.outputs + kTile - 1) / kTile;
    const int64_t i0 = tile / across * kTile, o0 = tile % across * kTile;
    products<C>(
        a.tokens, false, [&](int64_t k, int r) { return input(k, i0 + r); },
        [&](int64_t k, int r) { return grad(k, o0 + r); }, shared, first);
    return dot(first, first);
  }
}

// Four blocks on a multiprocessor: left to itself, the compiler makes room for more, and spills.
template <class C, bool kGram>
__global__ void __launch_bounds__(kThreads, 4)
    tile_kernel(const __grid_constant__ LinearParams p, int64_t tiles) {
  EMBATTLE_DYNAMIC_SHARED(shared);
  const Shape shape{.lanes = kThreads};
  Team team(shape, shared);
  C* const slabs = reinterpret_cast<C*>(shared + sizeof(TeamScratch));
  for (int64_t unit = blockIdx.x; unit < p.args.batch * p.splits; unit += gridDim.x) {
    const int64_t sample = unit / p.splits;
    if (p.second && !p.redo[sample]) continue;
    double square = 0;
    for (int64_t tile = unit % p.splits; tile < tiles; tile += p.splits)
      square += tile_square<C, kGram>(p, sample, tile, slabs);
    square = team.sum(square);
    if (threadIdx.x == 0) p.partial[unit] = square;
  }
}

// What brings n numbers into range, and `least` with them.
__device__ EMBATTLE_NOINLINE double scale_of(const Lanes& team, const ConstData& x, int64_t begin,
                                             int64_t n, double least) {
  double most = least;
  for (int64_t i = team.rank; i < n; i += team.size)
    most = larger(most, magnitude(load_one<double>(x.data, x.dtype, begin + i)));
  return scale_for(team.max(most));
}

// A warp for each sample.
__global__ void __launch_bounds__(256)
    linear_finish_kernel(const __grid_constant__ LinearParams p) {
  const Lanes team(32);
  const LinearNormArgs& a = p.args;
  for (int64_t sample = team.index; sample < a.batch; sample += team.count) {
    if (p.second && !p.redo[sample]) continue;
    double total = 0, square = 0, beyond = 0;  // beyond: 1 where such numbers cannot be held
    for (int64_t t = team.rank; t < a.tokens; t += 32) {
      const double trace = p.traces[sample * a.tokens + t];
      total += magnitude(trace);
      if (__double_as_longlong(trace) < 0) beyond = 1;
    }
    if (p.tiled)
      for (int64_t i = team.rank; i < p.splits; i += 32) square += p.partial[sample * p.splits + i];
    total = team.sum(total);
    square = team.sum(square);
    beyond = team.max(beyond);
    if (!p.tiled || !(total > 0 || p.second)) square = total;
    const bool cancels = !p.exact && total > 0 && !(square * 16 > total);
    const bool redo = p.tiled && !p.second && (beyond != 0 || cancels);
    double norm = sqrt(square);
    if (redo && p.scales) {
      const int64_t inputs = a.tokens * a.inputs, outputs = a.tokens * a.outputs;
      const double in = scale_of(team, a.input, sample * inputs, inputs, a.bias ? 1 : 0);
      const double out = scale_of(team, a.grad, sample * outputs, outputs, 0);
      if (team.rank == 0) {
        p.scales[2 * sample] = in;
        p.scales[2 * sample + 1] = out;
      }
    }
    if (team.rank != 0) continue;
    if (p.second && p.scales) norm = unscaled(norm, p.scales[2 * sample], p.scales[2 * sample + 1]);
    if (p.redo && !p.second) p.redo[sample] = redo;
    store_one(a.norms.data, a.norms.dtype, sample, norm);
  }
}

}  // namespace

int linear_grad_norm(const LinearNormArgs& args, const Context& context) {
  Queue queue(context);
  if (args.tokens == 0 || args.outputs == 0 || (args.inputs == 0 && !args.bias)) {  // no weight
    queue.clear(args.norms.data, size_t(args.batch) * size_t(bytes_of(args.norms.dtype)));
    return queue.error();
  }
  if (args.batch == 0) return cudaSuccess;
  const bool wide = args.input.dtype == Dtype::f64 || args.grad.dtype == Dtype::f64;
  const int64_t inputs = args.inputs + (args.bias ? 1 : 0);
  const bool gram = args.method == LinearMethod::gram ||
                    (args.method == LinearMethod::automatic &&
                     args.tokens * (args.inputs + args.outputs) <= 2 * args.inputs * args.outputs);
  const auto sides = [](int64_t n) { return (n + kTile - 1) / kTile; };
  const int64_t pairs = sides(args.tokens) * (sides(args.tokens) + 1) / 2;
  const int64_t direct = sides(inputs) * sides(args.outputs);

  LinearParams p;
  p.args = args;
  p.input = Rows::of(args.input, args.inputs, 4);
  p.grad = Rows::of(args.grad, args.outputs, 4);
  p.wide = wide;
  p.tiled = args.tokens > 1 || wide;
  p.exact = !gram && wide;
  // Several blocks for a sample where samples alone do not fill the device.
  const int64_t wanted = 16 * int64_t(queue.device(cudaDevAttrMultiProcessorCount)) / args.batch;
  p.splits = std::max<int64_t>(1, std::min(wanted, std::max(pairs, direct)));

  queue.allocate(Array{&p.traces, args.batch * args.tokens},
                 Array{&p.partial, p.tiled ? args.batch * p.splits : 0},
                 Array{&p.redo, p.tiled ? args.batch : 0},
                 Array{&p.scales, wide ? 2 * args.batch : 0});
  const Grid finish{(args.batch + 7) / 8, 256};
  const auto tiles = [&](auto kernel, size_t element, int64_t count) {
    const size_t shared = sizeof(TeamScratch) + 2 * kDepth * (kTile + 1) * element;
    queue.launch(kernel, {args.batch * p.splits, kThreads, shared}, p, count);
  };
  queue.launch(trace_kernel, {(args.batch * args.tokens + 7) / 8, 256}, p);
  if (p.tiled && gram)
    tiles(wide ? tile_kernel<double, true> : tile_kernel<float, true>, wide ? 8 : 4, pairs);
  else if (p.tiled)
    tiles(wide ? tile_kernel<double, false> : tile_kernel<float, false>, wide ? 8 : 4, direct);
  queue.launch(linear_finish_kernel, finish, p);
  if (p.tiled) {
    p.second = true;
    tiles(tile_kernel<double, false>, 8, direct);
    queue.launch(linear_finish_kernel, finish, p);
  }
  return queue.error();
}

}  // namespace embattle::cuda
