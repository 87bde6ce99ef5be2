// Rows of an embedding table: perturbing them on the way out, summing their gradients, and the
// optimiser's step. Every row's sum is formed by one thread, in the order of the batch.
#include <math.h>

#include <type_traits>

#include "../formulas.h"
#include "../launch_clip.h"
#include "lanes.h"
#include "level.h"
#include "past_cache.h"
#include "rows.h"

namespace embattle {
namespace {

template <class T>
inline void copy_row(const T* x, int64_t n, T* out) {
  memcpy(out, x, static_cast<size_t>(n) * sizeof(T));
}

// Eight elements as they are stored.
template <class W>
using Stored = std::conditional_t<sizeof(W) == 4, f32x8, u16x8>;

// kPast: past the cache. Precondition: `out` is aligned to 64 bytes then.
template <bool kPast, class W, class D>
inline void add_row(const W* weight, const D* delta, int64_t n, W* out) {
  int64_t i = 0;
  if constexpr (sizeof(W) == 8 || sizeof(D) == 8) {
    for (; i < n; ++i) narrow(static_cast<double>(widened(weight[i])) + widened(delta[i]), out[i]);
  } else {
    for (; i + 8 <= n; i += 8) {
      const f32x8 sum = load8(weight + i) + load8(delta + i);
      if constexpr (kPast) {
        W stored[8];
        store8(stored, sum);
        put_past_cache(out + i, bits_as<Stored<W>>(stored));
      } else {
        store8(out + i, sum);
      }
    }
    for (; i < n; ++i) narrow(widened(weight[i]) + widened(delta[i]), out[i]);
  }
}

// total[0, dim) = the sum of a run's rows.
template <class T>
inline void sum_run(const Runs& runs, int64_t run, const T* grad, int64_t dim, double* total) {
  for (int64_t c = 0; c < dim; ++c) total[c] = 0;
  for (int64_t i = runs.begin(run); i < runs.end(run); ++i)
    add_scaled(grad + runs.position(i) * dim, 1, dim, total);
}

// The weights of samples, by the positions of their items; or ones.
class Weights {
 public:
  explicit Weights(const SegmentSumArgs& args)
      : given_(args.weights.data != nullptr),
        tokens_(args.tokens),
        of_sample_(given_ ? args.count / args.tokens : 0) {
    for (int64_t b = 0; given_ && b < args.count / tokens_; ++b)
      of_sample_[b] = element(args.weights, b);
  }
  double at(int64_t position) const { return given_ ? of_sample_[position / tokens_] : 1; }

 private:
  bool given_;
  int64_t tokens_;
  Scratch<double> of_sample_;
};

template <class T>
[[gnu::always_inline]] inline void load16(const T* x, f64x4 (&v)[4]) {
  if constexpr (sizeof(T) == 8) {
    for (int i = 0; i < 4; ++i) v[i] = load4(x + 4 * i);
  } else {
    const f32x8 a = load8(x), b = load8(x + 8);
    v[0] = lower(a);
    v[1] = upper(a);
    v[2] = lower(b);
    v[3] = upper(b);
  }
}

template <class T>
[[gnu::always_inline]] inline void store16(T* out, const f64x4 (&v)[4]) {
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      const f32x4 near = narrowed4(v[i]);
      memcpy(out + 4 * i, &near, sizeof(near));
    } else {
      for (int e = 0; e < 4; ++e) narrow(v[i][e], out[4 * i + e]);
    }
  }
}

// out[0, dim) = factor * x[0, dim)
template <class T>
inline void write_scaled(const T* x, double factor, int64_t dim, T* out) {
  int64_t c = 0;
  for (; c + 16 <= dim; c += 16) {
    f64x4 v[4];
    load16(x + c, v);
    for (int k = 0; k < 4; ++k) v[k] *= factor;
    store16(out + c, v);
  }
  for (; c < dim; ++c) narrow(factor * static_cast<double>(widened(x[c])), out[c]);
}

// out[0, dim) = the sum of a run's rows, each times its weight.
template <class T>
inline void write_sum(const Runs& runs, int64_t run, const T* grad, const Weights& weights,
                      int64_t dim, T* out) {
  const int64_t begin = runs.begin(run), end = runs.end(run);
  const auto row = [&](int64_t i) { return grad + runs.position(i) * dim; };
  const auto weight = [&](int64_t i) { return weights.at(runs.position(i)); };
  for (int64_t i = begin + 8; i < end + 8 && i < runs.items(); ++i)  // they lie anywhere
    for (int64_t c = 0; c < dim; c += 64 / static_cast<int64_t>(sizeof(T)))
      __builtin_prefetch(row(i) + c);
  if (end == begin + 1) {  // most runs: nothing that a processor has to guess
    write_scaled(row(begin), weight(begin), dim, out);
    return;
  }
  int64_t c = 0;
  for (; c + 16 <= dim; c += 16) {
    f64x4 sum[4] = {};
    for (int64_t i = begin; i < end; ++i) {
      const double factor = weight(i);
      f64x4 x[4];
      load16(row(i) + c, x);
      for (int k = 0; k < 4; ++k) sum[k] += factor * x[k];
    }
    store16(out + c, sum);
  }
  for (; c < dim; ++c) {
    double sum = 0;
    for (int64_t i = begin; i < end; ++i)
      sum += weight(i) * static_cast<double>(widened(row(i)[c]));
    narrow(sum, out[c]);
  }
}

inline bool finite(double x) { return fabs(x) < HUGE_VAL; }

}  // namespace

void EMBATTLE_AT_LEVEL(embedding_perturb)(const PerturbArgs& args, ParallelFor parallel_for) {
  const int64_t dim = args.dim;
  with_type(args.weight.dtype, [&](auto* weight_type) {
    with_type(args.delta.dtype, [&](auto* delta_type) {
      using W = Element<decltype(weight_type)>;
      using D = Element<decltype(delta_type)>;
      const W* const weight = static_cast<const W*>(args.weight.data);
      const auto* const delta = static_cast<decltype(delta_type)>(args.delta.data);
      W* const out = static_cast<W*>(args.out.data);
      const bool past = pays_past_cache(out, args.count, dim * static_cast<int64_t>(sizeof(W)));
      const auto add = past ? add_row<true, W, D> : add_row<false, W, D>;
      spread(parallel_for, args.count, kGrain / (1 + dim) + 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const W* const row = weight + args.indices[i] * dim;
          if (args.inverse[i] < 0)
            copy_row(row, dim, out + i * dim);
          else
            add(row, delta + args.inverse[i] * dim, dim, out + i * dim);
        }
        if (past) settle_stores();
      });
    });
  });
}

void EMBATTLE_AT_LEVEL(segment_sum)(const SegmentSumArgs& args, ParallelFor parallel_for) {
  const int64_t dim = args.dim;
  const Runs runs(args.inverse, args.count, args.rows, args.padding);
  const Weights weights(args);
  void* sums = args.out.data;
  int64_t* keys = nullptr;
  if (args.found) args.found->allocate(args.found->self, runs.count(), &keys, &sums);
  with_type(args.grad.dtype, [&](auto* type) {
    using T = Element<decltype(type)>;
    const T* const grad = static_cast<const T*>(args.grad.data);
    T* const out = static_cast<T*>(sums);
    // All bits zero is the number zero in every dtype. Without columns there is no memory.
    if (!args.found && dim > 0)
      spread(parallel_for, args.rows, kGrain / (1 + dim) + 1, [&](int64_t begin, int64_t end) {
        memset(out + begin * dim, 0, static_cast<size_t>((end - begin) * dim) * sizeof(T));
      });
    // In shares of as many items: a few rows may hold most of them.
    spread(parallel_for, runs.items(), kGrain / (1 + dim) + 1, [&](int64_t begin, int64_t end) {
      const int64_t last = runs.first_from(end);
      for (int64_t run = runs.first_from(begin); run < last; ++run) {
        T* const row = out + (args.found ? run : runs.key(run)) * dim;
        if (args.found) keys[run] = runs.key(run);
        write_sum(runs, run, grad, weights, dim, row);
      }
    });
  });
}

void EMBATTLE_AT_LEVEL(rowwise_adagrad)(const AdagradArgs& args, ParallelFor parallel_for) {
  const int64_t dim = args.dim;
  const Runs runs(args.indices, args.count, args.rows);
  const int64_t work = dim * (2 + args.count / (runs.count() + 1));
  with_type(args.weight.dtype, [&](auto* weight_type) {
    with_type(args.state.dtype, [&](auto* state_type) {
      with_type(args.grad.dtype, [&](auto* grad_type) {
        using W = Element<decltype(weight_type)>;
        using S = Element<decltype(state_type)>;
        W* const weights = static_cast<W*>(args.weight.data);
        S* const states = static_cast<S*>(args.state.data);
        const auto* const grad = static_cast<decltype(grad_type)>(args.grad.data);
        const auto step_row = [&](int64_t run, double* total) {
          sum_run(runs, run, grad, dim, total);
          const double norm = row_norm(static_cast<const double*>(total), dim);
          if (!finite(norm)) return;  // one bad sample must not destroy a row
          const double factor = norm > args.max_norm ? args.max_norm / norm : 1;
          S& state = states[runs.key(run)];
          const double length = factor * norm;
          const double mean = dim > 0 ? length * length / static_cast<double>(dim) : 0;
          const double sum = static_cast<double>(widened(state)) + mean;
          const double step = adagrad_step(args.lr, factor, sqrt(sum), args.eps);
          narrow(sum, state);
          W* const weight = weights + runs.key(run) * dim;
          for (int64_t c = 0; c < dim; ++c)
            narrow(static_cast<double>(widened(weight[c])) - step * total[c], weight[c]);
        };
        spread(parallel_for, runs.count(), kGrain / (1 + work) + 1,
               [&](int64_t begin, int64_t end) {
                 Scratch<double> total(dim);
                 for (int64_t run = begin; run < end; ++run) step_row(run, total.get());
               });
      });
    });
  });
}

}  // namespace embattle
