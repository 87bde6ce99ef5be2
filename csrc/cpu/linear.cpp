// Per-sample norms of a linear layer's weight gradient W_b = A_b^T G_b, without W_b in memory.
//
// Gram form:   ||W||^2 = sum_{t,s} <a_t, a_s> <g_t, g_s>     tokens^2 (inputs + outputs) / 2
// products Direct form: W in tiles of registers, squared and dropped  tokens inputs outputs
// products
//
// Both run in float32 for float32 and half inputs. The Gram form's rounding errors are relative to
// the trace, sum_t ||a_t||^2 ||g_t||^2, which is known in float64: where the result is far smaller,
// tokens cancel, and the sample is done again by the direct form in float64.
#include <math.h>

#include "../launch_clip.h"
#include "lanes.h"
#include "level.h"
#include "scratch.h"
#include "spread.h"

namespace embattle {
namespace {

template <class C>
struct Vec;
template <>
struct Vec<float> {
  using type = f32x8;
  static constexpr int width = 8;
  [[gnu::always_inline]] static f32x8 load(const float* x) { return load8(x); }
  [[gnu::always_inline]] static double sum(f32x8 v) { return sum_of(lower(v) + upper(v)); }
};
template <>
struct Vec<double> {
  using type = f64x4;
  static constexpr int width = 4;
  [[gnu::always_inline]] static f64x4 load(const double* x) { return load4(x); }
  [[gnu::always_inline]] static double sum(f64x4 v) { return sum_of(v); }
};

// ---- Gram form ----

constexpr int kSide = 3;         // tokens of a tile: 9 accumulators and 6 rows fit 16 registers
constexpr int64_t kSpan = 1024;  // columns that are summed in one accumulator

// out[r][s] = <x[r], y[s]>
template <class C>
void inner_products(const C* const* x, const C* const* y, int64_t n, double (*out)[kSide]) {
  using V = Vec<C>;
  for (int r = 0; r < kSide; ++r)
    for (int s = 0; s < kSide; ++s) out[r][s] = 0;
  int64_t i = 0;
  while (i + V::width <= n) {
    const int64_t stop = i + kSpan < n ? i + kSpan : n;
    typename V::type sum[kSide][kSide] = {};
    for (; i + V::width <= stop; i += V::width) {
      typename V::type row[kSide];
#pragma GCC unroll 3
      for (int s = 0; s < kSide; ++s) row[s] = V::load(y[s] + i);
#pragma GCC unroll 3
      for (int r = 0; r < kSide; ++r) {
        const typename V::type value = V::load(x[r] + i);
#pragma GCC unroll 3
        for (int s = 0; s < kSide; ++s) sum[r][s] += value * row[s];
      }
    }
#pragma GCC unroll 3
    for (int r = 0; r < kSide; ++r)
#pragma GCC unroll 3
      for (int s = 0; s < kSide; ++s) out[r][s] += V::sum(sum[r][s]);
  }
  for (; i < n; ++i)
    for (int r = 0; r < kSide; ++r)
      for (int s = 0; s < kSide; ++s) out[r][s] += static_cast<double>(x[r][i]) * y[s][i];
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
      double in[kSide][kSide], out[kSide][kSide], tile = 0;
      inner_products(at, as, args.inputs, in);
      inner_products(gt, gs, args.outputs, out);
      for (int i = 0; i < kSide; ++i)
        for (int j = 0; j < kSide; ++j) tile += (in[i][j] + (args.bias ? 1 : 0)) * out[i][j];
      sum += s == t ? tile : 2 * tile;
    }
  }
  return sum;
}

// ---- Direct form ----

constexpr int kRows = 6;     // of a tile of W; two vectors wide: 12 accumulators
constexpr int kVectors = 2;  //

// Working memory of one thread.
template <class C>
struct Panels {
  static constexpr int kWidth = kVectors * Vec<C>::width;
  Scratch<C> a;  // [ceil(inputs / kRows), tokens, kRows]
  Scratch<C> g;  // [tokens, kWidth]
  static int64_t strips(int64_t inputs) { return (inputs + kRows - 1) / kRows; }
  explicit Panels(const LinearNormArgs& args)
      : a(strips(args.inputs) * args.tokens * kRows), g(args.tokens * kWidth) {}
};

// out[token][column] = scale * x[token][first + column], zero beyond the row's end.
template <class T, class C>
void pack(const T* x, C scale, int64_t tokens, int64_t width, int64_t first, int64_t columns,
          C* out) {
  const int64_t kept = first + columns < width ? columns : width - first;
  for (int64_t t = 0; t < tokens; ++t, out += columns) {
    const T* const row = x + t * width + first;
    for (int64_t c = 0; c < kept; ++c) out[c] = scale * static_cast<C>(widened(row[c]));
    for (int64_t c = kept; c < columns; ++c) out[c] = 0;
  }
}

// Powers of two that bring a sample into range.
struct Scales {
  double input = 1, grad = 1;
};

template <class C, class T, class U>
double direct_square(const T* a, const U* g, const LinearNormArgs& args, const Scales& scales,
                     Panels<C>& panels) {
  using V = Vec<C>;
  constexpr int kWidth = Panels<C>::kWidth;
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
      typename V::type tile[kRows][kVectors] = {};
      for (int64_t t = 0; t < tokens; ++t, in += kRows, out += kWidth) {
        const typename V::type low = V::load(out), high = V::load(out + V::width);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
          tile[r][0] += in[r] * low;
          tile[r][1] += in[r] * high;
        }
      }
      typename V::type square{};
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) square += tile[r][0] * tile[r][0] + tile[r][1] * tile[r][1];
      sum += V::sum(square);
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

// ---- One sample ----

// sum_t (||a_t||^2 [+ 1]) ||g_t||^2, and whether float32 (C double: float64) can hold such numbers.
template <class C, class T, class U>
double trace(const T* a, const U* g, const LinearNormArgs& args, bool& moderate) {
  constexpr bool kWide = sizeof(C) == sizeof(double);
  constexpr double kLeast = kWide ? 1e-140 : 1e-25, kMost = kWide ? 1e+140 : 1e+30;
  const auto holds = [](double x) { return x > kLeast && x < kMost; };
  double sum = 0;
  for (int64_t t = 0; t < args.tokens; ++t) {
    double in, out;
    if constexpr (kWide) {
      in = squares_wide(a + t * args.inputs, args.inputs);
      out = squares_wide(g + t * args.outputs, args.outputs);
      moderate &= holds(in) || largest(a + t * args.inputs, args.inputs, 0) == 0;
      moderate &= holds(out) || largest(g + t * args.outputs, args.outputs, 0) == 0;
    } else {
      in = squares(a + t * args.inputs, args.inputs);
      out = squares(g + t * args.outputs, args.outputs);
      moderate &= (in == 0 || holds(in)) && (out == 0 || holds(out));
    }
    sum += (in + (args.bias ? 1 : 0)) * out;
  }
  return sum;
}

template <class T>
const T* as_type(const T* x, int64_t, Scratch<T>&) {
  return x;
}
template <class C, class T>
const C* as_type(const T* x, int64_t n, Scratch<C>& held) {
  for (int64_t i = 0; i < n; ++i) held[i] = static_cast<C>(widened(x[i]));
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
  spread(parallel_for, args.batch, kGrain / (1 + work) + 1, [&](int64_t begin, int64_t end) {
    const bool packs = sizeof(T) != sizeof(C) || sizeof(U) != sizeof(C);
    Scratch<C> held_a(gram && packs ? tokens * inputs : 0);
    Scratch<C> held_g(gram && packs ? tokens * outputs : 0);
    Scratch<C> zeros(gram ? longest : 0);
    for (int64_t i = 0; gram && i < longest; ++i) zeros[i] = 0;
    LinearNormArgs none = args;
    none.inputs = none.tokens = 0;
    Panels<C> panels(gram || tokens <= 1 ? none : args);
    for (int64_t b = begin; b < end; ++b) {
      const T* const a = static_cast<const T*>(args.input.data) + b * tokens * inputs;
      const U* const g = static_cast<const U*>(args.grad.data) + b * tokens * outputs;
      bool moderate = true;
      const double bound = trace<C>(a, g, args, moderate);
      double square = bound;
      if (tokens > 1 && moderate && bound > 0)
        square = gram ? gram_square<C>(as_type(a, tokens * inputs, held_a),
                                       as_type(g, tokens * outputs, held_g), zeros.get(), args)
                      : direct_square<C>(a, g, args, Scales{}, panels);
      const bool exact = tokens == 1 || (!gram && sizeof(C) == sizeof(double));
      double norm = sqrt(square);
      if ((!moderate && (tokens > 1 || sizeof(C) == sizeof(double))) ||
          (!exact && bound > 0 && !(square * 16 > bound))) {
        Panels<double> wide(args);
        Scales scales;
        if (!moderate && sizeof(C) == sizeof(double))
          scales = {scale_for(largest(a, tokens * inputs, args.bias ? 1. : 0.)),
                    scale_for(largest(g, tokens * outputs, 0.))};
        norm = sqrt(direct_square<double>(a, g, args, scales, wide)) / scales.input / scales.grad;
      }
      put(args.norms, b, norm);
    }
  });
}

}  // namespace

void EMBATTLE_AT_LEVEL(linear_grad_norm)(const LinearNormArgs& args, ParallelFor parallel_for) {
  with_type(args.input.dtype, [&](auto* input_type) {
    with_type(args.grad.dtype, [&](auto* grad_type) {
      using T = Element<decltype(input_type)>;
      using U = Element<decltype(grad_type)>;
      if constexpr (sizeof(T) == sizeof(double) || sizeof(U) == sizeof(double))
        run<double, T, U>(args, parallel_for);
      else
        run<float, T, U>(args, parallel_for);
    });
  });
}

}  // namespace embattle
