// Rows of an embedding table: perturbing them on the way out, summing their gradients, and the
// optimiser's step. Every row's sum is formed by one thread, in the order of the batch.
#include <math.h>

#include <type_traits>

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
  const Runs runs(args.inverse, args.count, args.rows);
  const int64_t work = dim * (1 + args.count / (runs.count() + 1));
  with_type(args.grad.dtype, [&](auto* type) {
    using T = Element<decltype(type)>;
    const T* const grad = static_cast<const T*>(args.grad.data);
    T* const out = static_cast<T*>(args.out.data);
    // All bits zero is the number zero in every dtype.
    spread(parallel_for, args.rows, kGrain / (1 + dim) + 1, [&](int64_t begin, int64_t end) {
      memset(out + begin * dim, 0, static_cast<size_t>((end - begin) * dim) * sizeof(T));
    });
    spread(parallel_for, runs.count(), kGrain / (1 + work) + 1, [&](int64_t begin, int64_t end) {
      Scratch<double> total(dim);
      for (int64_t run = begin; run < end; ++run) {
        T* const row = out + runs.key(run) * dim;
        if (runs.end(run) == runs.begin(run) + 1) {
          copy_row(grad + runs.position(runs.begin(run)) * dim, dim, row);
          continue;
        }
        sum_run(runs, run, grad, dim, total.get());
        for (int64_t c = 0; c < dim; ++c) narrow(total[c], row[c]);
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
          const double square = squares(static_cast<const double*>(total), dim);
          if (!finite(square)) return;  // one bad sample must not destroy a row
          const double norm = sqrt(square);
          const double factor = norm > args.max_norm ? args.max_norm / norm : 1;
          S& state = states[runs.key(run)];
          const double mean = dim > 0 ? factor * factor * square / static_cast<double>(dim) : 0;
          const double sum = static_cast<double>(widened(state)) + mean;
          const double root = sqrt(sum) + args.eps;
          const double step = root == 0 ? 0 : args.lr * factor / root;  // with eps 0: no 0 / 0
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
