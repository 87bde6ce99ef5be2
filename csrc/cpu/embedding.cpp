// Rows of an embedding table: perturbing them on the way out, summing their gradients, and the
// optimiser's step. Every row's sum is formed by one thread, in the order of the batch.
#include "../formulas.h"
#include "../launch_clip.h"
#include "rows.h"
#include "sink.h"
#include "squares.h"

namespace embattle {
namespace {

// out[at, at + n) = weight[0, n) + delta[0, n)
template <class W, class D>
inline void add_row(const W* weight, const D* delta, int64_t n, const Sink<W>& out, int64_t at) {
  if constexpr (sizeof(W) == 8 || sizeof(D) == 8)
    each(0, n, [&](int64_t i, auto w) {
      store(out.p + at + i, w, load(weight + i, w) + load(delta + i, w));
    });
  else
    each<kFloats>(0, n, [&](int64_t i, auto w) EMBATTLE_INLINE {
      out.store(at + i, w, fetch(weight + i, w) + fetch(delta + i, w));
    });
}

// total[0, dim) = the sum of a run's rows. The first one is copied: what is cleared is not at once
// there to be read in wider pieces.
template <class T>
inline void sum_run(const Runs& runs, int64_t run, const T* grad, int64_t dim, double* total) {
  const auto row = [&](int64_t i) { return grad + runs.position(i) * dim; };
  const T* const x = row(runs.begin(run));
  each(0, dim, [=](int64_t c, auto n) { store(total + c, n, load(x + c, n)); });
  for (int64_t i = runs.begin(run) + 1; i < runs.end(run); ++i) add_scaled(row(i), 1, dim, total);
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

// out[c, c + n) = the sum of a run's rows, each times its weight, in kVectors vectors of n
// elements.
template <int kVectors, class N, class R, class W, class T>
EMBATTLE_INLINE inline void sum_columns(int64_t begin, int64_t end, const R& row, const W& weight,
                                        int64_t c, N n, T* out) {
  V sum[kVectors] = {};
  for (int64_t i = begin; i < end; ++i) {
    const double factor = weight(i);
    for (int k = 0; k < kVectors; ++k) sum[k] += factor * load(row(i) + c + k * kLanes, n);
  }
  for (int k = 0; k < kVectors; ++k) store(out + c + k * kLanes, n, sum[k]);
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
    const T* const x = row(begin);
    const double factor = weight(begin);
    return each(0, dim, [=](int64_t c, auto n) { store(out + c, n, factor * load(x + c, n)); });
  }
  constexpr int kAtOnce = 16 / kLanes;
  int64_t c = 0;
  for (; c + 16 <= dim; c += 16) sum_columns<kAtOnce>(begin, end, row, weight, c, Whole{}, out);
  each(c, dim, [&](int64_t at, auto n) { sum_columns<1>(begin, end, row, weight, at, n, out); });
}

}  // namespace

void EMBATTLE_AT_LEVEL(embedding_perturb)(const PerturbArgs& args, ParallelFor parallel_for) {
  const int64_t dim = args.dim;
  with_type(args.weight.dtype, [&]<class W>(W*) {
    with_type(args.delta.dtype, [&]<class D>(D*) {
      const W* const weight = static_cast<const W*>(args.weight.data);
      const D* const delta = static_cast<const D*>(args.delta.data);
      const Sink<W> out(args.out, nullptr, args.count, dim);
      parallel(parallel_for, args.count, kGrain / (1 + dim) + 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const W* const row = weight + args.indices[i] * dim;
          if (args.inverse[i] < 0)
            std::memcpy(static_cast<void*>(out.p + i * dim), row,
                        static_cast<size_t>(dim) * sizeof(W));
          else
            add_row(row, delta + args.inverse[i] * dim, dim, out, i * dim);
        }
        out.settle();
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
  with_type(args.grad.dtype, [&]<class T>(T*) {
    const T* const grad = static_cast<const T*>(args.grad.data);
    T* const out = static_cast<T*>(sums);
    // All bits zero is the number zero in every dtype. Without columns there is no memory.
    if (!args.found && dim > 0)
      parallel(parallel_for, args.rows, kGrain / (1 + dim) + 1, [&](int64_t begin, int64_t end) {
        std::memset(static_cast<void*>(out + begin * dim), 0,
                    static_cast<size_t>((end - begin) * dim) * sizeof(T));
      });
    // In shares of as many items: a few rows may hold most of them.
    parallel(parallel_for, runs.items(), kGrain / (1 + dim) + 1, [&](int64_t begin, int64_t end) {
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
  with_type(args.weight.dtype, [&]<class W>(W*) {
    with_type(args.state.dtype, [&]<class S>(S*) {
      with_type(args.grad.dtype, [&]<class G>(G*) {
        W* const weights = static_cast<W*>(args.weight.data);
        S* const states = static_cast<S*>(args.state.data);
        const G* const grad = static_cast<const G*>(args.grad.data);
        const auto step_row = [&](int64_t run, double* total) {
          sum_run(runs, run, grad, dim, total);
          const double norm = row_norm(static_cast<const double*>(total), dim);
          if (!(norm < __builtin_inf())) return;  // one bad sample must not destroy a row
          const double factor = norm > args.max_norm ? args.max_norm / norm : 1;
          S& state = states[runs.key(run)];
          const double length = factor * norm;
          const double mean = dim > 0 ? length * length / static_cast<double>(dim) : 0;
          const double sum = value_of(state) + mean;
          const double step = adagrad_step(args.lr, factor, __builtin_sqrt(sum), args.eps);
          state = nearest<S>(sum);
          W* const weight = weights + runs.key(run) * dim;
          each(0, dim, [=](int64_t c, auto n) {
            store(weight + c, n, load(weight + c, n) - step * load(total + c, n));
          });
        };
        parallel(parallel_for, runs.count(), kGrain / (1 + work) + 1,
                 [&](int64_t begin, int64_t end) {
                   Scratch<double> total(dim);
                   for (int64_t run = begin; run < end; ++run) step_row(run, total.get());
                 });
      });
    });
  });
}

}  // namespace embattle
