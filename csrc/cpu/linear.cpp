// Per-sample norms of a linear layer's weight gradient W_b = A_b^T G_b, without W_b in memory.
//
// Gram form:   ||W||^2 = sum_{t,s} <a_t, a_s> <g_t, g_s>; tokens^2 (inputs + outputs) / 2 products.
// Direct form: W in tiles of registers, squared and dropped; tokens inputs outputs products.
//
// Both run in float32 for float32 and half inputs. The Gram form's rounding errors are relative to
// the trace, sum_t ||a_t||^2 ||g_t||^2, which is known in float64: where the result is far smaller,
// tokens cancel, and the sample is done again by the direct form in float64.
#include "../launch_clip.h"
#include "scratch.h"
#include "squares.h"

namespace embattle {
namespace {

// ---- Gram form ----

constexpr int kSide = 3;                  // tokens of a tile: 9 accumulators, 6 rows
constexpr int64_t kSpan = 128 * kFloats;  // columns that are summed in one accumulator

// out[kSide * r + s] = <x[r], y[s]>
template <class C>
void inner_products(const C* const* x, const C* const* y, int64_t n, double* out) {
  typedef Lane<C> In;
  for (int k = 0; k < kSide * kSide; ++k) out[k] = 0;
  for (int64_t i = 0; i < n; i += kSpan) {
    typename In::Vector sum[kSide][kSide] = {};
    each<In::kCount>(i, i + kSpan < n ? i + kSpan : n, [&](int64_t at, auto w) EMBATTLE_INLINE {
      typename In::Vector row[kSide];
#pragma GCC unroll 3
      for (int s = 0; s < kSide; ++s) row[s] = In::load(y[s] + at, w);
#pragma GCC unroll 3
      for (int r = 0; r < kSide; ++r) {
        const auto value = In::load(x[r] + at, w);
#pragma GCC unroll 3
        for (int s = 0; s < kSide; ++s) sum[r][s] += value * row[s];
      }
    });
    V parts[kSide * kSide];
    for (int k = 0; k < kSide * kSide; ++k) parts[k] = In::in_double(sum[k / kSide][k % kSide]);
    each(0, kSide * kSide, [&](int64_t k, auto w) EMBATTLE_INLINE {
      if constexpr (std::is_same_v<decltype(w), Whole>)
        add_to(out + k, w, sums_of(parts + k));
      else
        for (int64_t rest = k; rest < k + w; ++rest) out[rest] += total(parts[rest]);
    });
  }
}

// a: [tokens, inputs], g: [tokens, outputs]; zeros: as many as the longer row.
template <class C>
double gram_square(const C* a, const C* g, const C* zeros, const LinearNormArgs& args) {
  const auto rows = [&](const C* x, int64_t width, int64_t token, const C** out) {
    for (int64_t r = 0; r < kSide; ++r)
      out[r] = token + r < args.tokens ? x + (token + r) * width : zeros;
  };
  double sum = 0;
  for (int64_t t = 0; t < args.tokens; t += kSide) {
    const C *at[kSide], *gt[kSide], *as[kSide], *gs[kSide];
    rows(a, args.inputs, t, at);
    rows(g, args.outputs, t, gt);
    for (int64_t s = t; s < args.tokens; s += kSide) {
      rows(a, args.inputs, s, as);
      rows(g, args.outputs, s, gs);
      double in[kSide * kSide], out[kSide * kSide], tile = 0;
      inner_products(at, as, args.inputs, in);
      inner_products(gt, gs, args.outputs, out);
      for (int k = 0; k < kSide * kSide; ++k) tile += (in[k] + (args.bias ? 1 : 0)) * out[k];
      sum += s == t ? tile : 2 * tile;
    }
  }
  return sum;
}

// ---- Direct form ----

constexpr int kRows = 6;  // of a tile of W, one or two vectors wide: up to 12 accumulators

// Working memory of one thread.
template <class C>
struct Panels {
  Scratch<C> a;  // [ceil(inputs / kRows), tokens, kRows]
  Scratch<C> g;  // [tokens, a tile's columns]
  static int64_t strips(int64_t inputs) { return (inputs + kRows - 1) / kRows; }
  explicit Panels(const LinearNormArgs& args)
      : a(strips(args.inputs) * args.tokens * kRows), g(args.tokens * 2 * Lane<C>::kCount) {}
};

// out[token][column] = scale * x[token][first + column], zero beyond the row's end.
template <class T, class C>
void pack(const T* x, C scale, int64_t tokens, int64_t width, int64_t first, int64_t columns,
          C* out) {
  const int64_t kept = first + columns < width ? columns : width - first;
  for (int64_t t = 0; t < tokens; ++t, out += columns) {
    const T* const row = x + t * width + first;
    for (int64_t c = 0; c < kept; ++c) out[c] = scale * static_cast<C>(row[c]);
    for (int64_t c = kept; c < columns; ++c) out[c] = 0;
  }
}

// Powers of two that bring a sample into range.
struct Scales {
  double input = 1, grad = 1;
};

template <int kVectors, class C, class T>
double direct_in_tiles(const T* a, const T* g, const LinearNormArgs& args, const Scales& scales,
                       Panels<C>& panels) {
  typedef Lane<C> In;
  constexpr int kWidth = kVectors * In::kCount;
  const int64_t tokens = args.tokens, strips = Panels<C>::strips(args.inputs);
  for (int64_t strip = 0; strip < strips; ++strip)
    pack(a, static_cast<C>(scales.input), tokens, args.inputs, strip * kRows, kRows,
         panels.a.get() + strip * tokens * kRows);
  double sum = 0;
  for (int64_t column = 0; column < args.outputs; column += kWidth) {
    pack(g, static_cast<C>(scales.grad), tokens, args.outputs, column, kWidth, panels.g.get());
    for (int64_t strip = 0; strip < strips; ++strip) {
      const C* in = panels.a.get() + strip * tokens * kRows;
      const C* out = panels.g.get();
      typename In::Vector tile[kRows][kVectors] = {};
      for (int64_t t = 0; t < tokens; ++t, in += kRows, out += kWidth) {
        typename In::Vector columns[kVectors];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v)
          columns[v] = In::load(out + v * In::kCount, Count<In::kCount>{});
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
          for (int v = 0; v < kVectors; ++v) tile[r][v] += in[r] * columns[v];
      }
      typename In::Vector square{};
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) square += tile[r][v] * tile[r][v];
      sum += total(In::in_double(square));
    }
    if (args.bias) {
      double total[kWidth] = {};
      for (int64_t t = 0; t < tokens; ++t)
        for (int c = 0; c < kWidth; ++c) total[c] += static_cast<double>(panels.g[t * kWidth + c]);
      for (int c = 0; c < kWidth; ++c) sum += total[c] * scales.input * (total[c] * scales.input);
    }
  }
  return sum;
}

template <class C, class T>
double direct_square(const T* a, const T* g, const LinearNormArgs& args, const Scales& scales,
                     Panels<C>& panels) {
  return args.outputs <= Lane<C>::kCount ? direct_in_tiles<1>(a, g, args, scales, panels)
                                         : direct_in_tiles<2>(a, g, args, scales, panels);
}

// ---- One sample ----

// sum_t (||a_t||^2 [+ 1]) ||g_t||^2, and whether float32 (C double: float64) can hold such numbers.
template <class C, class T, class U>
double trace(const T* a, const U* g, const LinearNormArgs& args, bool& moderate) {
  constexpr bool kWide = sizeof(C) == sizeof(double);
  constexpr double kLeast = kWide ? 1e-140 : 1e-25, kMost = kWide ? 1e+140 : 1e+30;
  const auto square_of = [&](const auto* x, int64_t n) {
    const double square = kWide ? squares_wide(x, n) : squares(x, n);
    if (!(square > kLeast && square < kMost))
      moderate &= kWide ? largest(x, n, 0) == 0 : square == 0;
    return square;
  };
  double sum = 0;
  for (int64_t t = 0; t < args.tokens; ++t) {
    const double in = square_of(a + t * args.inputs, args.inputs);
    sum += (in + (args.bias ? 1 : 0)) * square_of(g + t * args.outputs, args.outputs);
  }
  return sum;
}

// x[0, n) as numbers of type C, in `held` unless they are.
template <class C, class T>
const C* as_type(const T* x, int64_t n, Scratch<C>& held) {
  typedef Lane<C> In;
  if constexpr (std::is_same_v<C, T>) return x;
  each<In::kCount>(0, n, [&](int64_t i, auto w) EMBATTLE_INLINE {
    put_words<C, In::kCount>(held.get() + i, w, In::load(x + i, w));
  });
  return held.get();
}

// C: what both forms compute in.
template <class C, class T, class U>
void run(const LinearNormArgs& args, ParallelFor parallel_for) {
  const int64_t inputs = args.inputs, outputs = args.outputs, tokens = args.tokens;
  if (tokens == 0 || outputs == 0 || (inputs == 0 && !args.bias)) {  // no weight at all
    for (int64_t b = 0; b < args.batch; ++b) put(args.norms, b, 0);
    return;
  }
  const bool gram =
      args.method == LinearMethod::gram || (args.method == LinearMethod::automatic &&
                                            tokens * (inputs + outputs) <= 2 * inputs * outputs);
  const int64_t longest = inputs > outputs ? inputs : outputs;
  const int64_t products =
      gram ? tokens * tokens * (inputs + outputs) / 2 : tokens * inputs * outputs;
  const int64_t work = (tokens == 1 ? 0 : products / 4) + tokens * (inputs + outputs);
  parallel(parallel_for, args.batch, kGrain / (1 + work) + 1, [&](int64_t begin, int64_t end) {
    Scratch<C> held_a(sizeof(T) != sizeof(C) ? tokens * inputs : 0);
    Scratch<C> held_g(sizeof(U) != sizeof(C) ? tokens * outputs : 0);
    Scratch<C> zeros(gram ? longest : 0);
    for (int64_t i = 0; gram && i < longest; ++i) zeros[i] = 0;
    LinearNormArgs none = args;
    none.inputs = none.tokens = 0;
    Panels<C> panels(gram || tokens <= 1 ? none : args);
    for (int64_t b = begin; b < end; ++b) {
      const T* const a = static_cast<const T*>(args.input.data) + b * tokens * inputs;
      const U* const g = static_cast<const U*>(args.grad.data) + b * tokens * outputs;
      const auto rows_a = [&] { return as_type(a, tokens * inputs, held_a); };
      const auto rows_g = [&] { return as_type(g, tokens * outputs, held_g); };
      bool moderate = true;
      const double bound = trace<C>(a, g, args, moderate);
      double square = bound;
      if (tokens > 1 && moderate && bound > 0)
        square = gram ? gram_square<C>(rows_a(), rows_g(), zeros.get(), args)
                      : direct_square<C>(rows_a(), rows_g(), args, Scales{}, panels);
      const bool exact = tokens == 1 || (!gram && sizeof(C) == sizeof(double));
      double norm = __builtin_sqrt(square);
      if ((!moderate && (tokens > 1 || sizeof(C) == sizeof(double))) ||
          (!exact && bound > 0 && !(square * 16 > bound))) {
        Panels<double> wide(args);
        Scales scales;
        if (!moderate && sizeof(C) == sizeof(double))
          scales = {scale_for(largest(a, tokens * inputs, args.bias ? 1. : 0.)),
                    scale_for(largest(g, tokens * outputs, 0.))};
        const double wide_square = direct_square<double>(rows_a(), rows_g(), args, scales, wide);
        norm = unscaled(__builtin_sqrt(wide_square), scales.input, scales.grad);
      }
      put(args.norms, b, norm);
    }
  });
}

}  // namespace

void EMBATTLE_AT_LEVEL(linear_grad_norm)(const LinearNormArgs& args, ParallelFor parallel_for) {
  with_type(args.input.dtype, [&]<class T>(T*) {
    with_type(args.grad.dtype, [&]<class U>(U*) {
      constexpr bool wide = sizeof(T) == sizeof(double) || sizeof(U) == sizeof(double);
      run<std::conditional_t<wide, double, float>, T, U>(args, parallel_for);
    });
  });
}

}  // namespace embattle
