// Per-sample norms of an embedding table's gradient: the rows of one index are summed before they
// are squared. A small hash table per sample finds them; the vocabulary does not matter.
#include "../launch_clip.h"
#include "scratch.h"
#include "squares.h"

namespace embattle {
namespace {

// Chains the positions of equal indices in ascending order. Memory for up to `capacity` positions.
class Chains {
 public:
  explicit Chains(int64_t capacity)
      : slots_(slots_for(capacity)), next_(capacity), last_(capacity), first_(capacity) {}

  void build(const int64_t* indices, int64_t n, int64_t padding) {
    int bits = 1;
    while ((int64_t(1) << bits) < 2 * n) ++bits;
    const int64_t mask = (int64_t(1) << bits) - 1;
    for (int64_t i = 0; i <= mask; ++i) slots_[i] = -1;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t index = indices[i];
      next_[i] = -1;
      last_[i] = i;
      first_[i] = index != padding;
      if (!first_[i]) continue;
      const uint64_t hash = static_cast<uint64_t>(index) * 0x9e3779b97f4a7c15u;
      int64_t slot = static_cast<int64_t>(hash >> (64 - bits));
      while (slots_[slot] >= 0 && indices[slots_[slot]] != index) slot = (slot + 1) & mask;
      const int64_t head = slots_[slot];
      if (head < 0) {
        slots_[slot] = i;
      } else {
        first_[i] = false;
        next_[last_[head]] = i;
        last_[head] = i;
      }
    }
  }

  bool first(int64_t i) const { return first_[i]; }  // first of its index, and no padding
  bool alone(int64_t i) const { return first_[i] && next_[i] < 0; }
  int64_t next(int64_t i) const { return next_[i]; }  // -1 at the end

 private:
  static int64_t slots_for(int64_t n) {
    int64_t slots = 2;
    while (slots < 2 * n) slots *= 2;
    return slots;
  }
  Scratch<int64_t> slots_, next_, last_;
  Scratch<bool> first_;
};

// Squared norm of one sample, times scale^2. grad: [n, dim]; total: [dim], working memory.
template <class T>
double sample_square(const Chains& chains, const T* grad, int64_t n, int64_t dim, double scale,
                     double* total) {
  double sum = 0;
  for (int64_t i = 0; i < n;) {
    if (chains.alone(i) && scale == 1) {  // neighbours without a twin are squared together
      int64_t end = i + 1;
      while (end < n && chains.alone(end)) ++end;
      sum += squares(grad + i * dim, (end - i) * dim);
      i = end;
      continue;
    }
    if (chains.first(i)) {
      for (int64_t c = 0; c < dim; ++c) total[c] = 0;
      for (int64_t j = i; j >= 0; j = chains.next(j)) add_scaled(grad + j * dim, scale, dim, total);
      sum += squares(total, dim);
    }
    ++i;
  }
  return sum;
}

void samples(const EmbeddingNormArgs& args, ParallelFor parallel_for) {
  const int64_t grain = kGrain / (1 + args.tokens * (args.dim + 8)) + 1;
  parallel(parallel_for, args.batch, grain, [&](int64_t begin, int64_t end) {
    Chains chains(args.tokens);
    Scratch<double> total(args.dim);
    with_type(args.grad.dtype, [&]<class T>(T*) {
      const T* const grad = static_cast<const T*>(args.grad.data);
      for (int64_t b = begin; b < end; ++b) {
        const int64_t start = b * args.tokens;
        chains.build(args.indices + start, args.tokens, args.padding);
        const T* const own = grad + start * args.dim;
        const auto square_at = [&](double scale) {
          return sample_square(chains, own, args.tokens, args.dim, scale, total.get());
        };
        put(args.norms, b,
            norm_of<T>(square_at, [&] { return largest(own, args.tokens * args.dim, 0); }));
      }
    });
  });
}

// Every index of a bag has the bag's gradient: its norm, times the norm of the indices' weights.
void bags(const EmbeddingNormArgs& args, ParallelFor parallel_for) {
  const auto end_of = [&](int64_t b) {
    return b + 1 < args.batch ? args.offsets[b + 1] : args.count;
  };
  int64_t longest = 0;
  for (int64_t b = 0; b < args.batch; ++b) {
    const int64_t length = end_of(b) - args.offsets[b];
    if (length > longest) longest = length;
  }
  const int64_t work = args.dim + 16 * (args.count / (args.batch + 1));
  parallel(parallel_for, args.batch, kGrain / (1 + work) + 1, [&](int64_t begin, int64_t end) {
    Chains chains(longest);
    for (int64_t b = begin; b < end; ++b) {
      const int64_t start = args.offsets[b], n = end_of(b) - start;
      chains.build(args.indices + start, n, args.padding);
      double sum = 0;
      int64_t kept = 0;
      for (int64_t i = 0; i < n; ++i) {
        kept += args.indices[start + i] != args.padding;
        if (!chains.first(i)) continue;
        double weight = 0;
        for (int64_t j = i; j >= 0; j = chains.next(j))
          weight += args.weights.data ? element(args.weights, start + j) : 1;
        sum += weight * weight;
      }
      double norm = 0;
      with_type(args.grad.dtype, [&]<class T>(T*) {
        norm = row_norm(static_cast<const T*>(args.grad.data) + b * args.dim, args.dim);
      });
      norm = kept == 0 ? 0 : norm * __builtin_sqrt(sum);
      put(args.norms, b, args.mean && kept > 0 ? norm / static_cast<double>(kept) : norm);
    }
  });
}

}  // namespace

void EMBATTLE_AT_LEVEL(embedding_grad_norm)(const EmbeddingNormArgs& args,
                                            ParallelFor parallel_for) {
  args.offsets ? bags(args, parallel_for) : samples(args, parallel_for);
}

}  // namespace embattle
