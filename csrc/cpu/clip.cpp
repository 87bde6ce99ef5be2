// Norms of samples over a list of gradients, and their clipped sums.
#include "../formulas.h"
#include "per_sample.h"

namespace embattle {
namespace {

// Samples are added in blocks of four (rows a power of two apart share a cache set), counted from
// the first: a block's sum is formed in registers, in float32 for float32 and half gradients, and
// added to a float64 total. Which samples share a block is fixed, and every column is summed on its
// own: any number of threads and any tiling give the same bits.
constexpr int64_t kBlock = 4;
constexpr int64_t kTile = 1024;  // columns; a tile's totals stay in the first-level cache
// A group of samples of this size is read from memory once and then again from the cache.
constexpr int64_t kGroupBytes = 4 << 20;

// ---- total[0, n) += sum_k factors[k] * rows[k][0, n) ----
//
// Meanwhile what lies `ahead` elements behind each row is fetched into the cache.

template <int K, class T>
[[gnu::noinline]] void add_rows(const T* const* given, const double* factors, int64_t n,
                                double* total, int64_t ahead) {
  typedef std::conditional_t<std::is_same_v<T, double>, double, float> C;
  typedef Lane<C> In;
  // Copies that the stores below cannot reach, so that the pointers stay in registers.
  const T* rows[K];
  typename In::Vector c[K];
#pragma GCC unroll 8
  for (int k = 0; k < K; ++k) {
    rows[k] = given[k];
    c[k] = typename In::Vector{} + static_cast<C>(factors[k]);
  }
  const auto add = [&](int64_t i, auto w) EMBATTLE_INLINE {
    auto sum = c[0] * In::load(rows[0] + i, w);
#pragma GCC unroll 8
    for (int k = 1; k < K; ++k) sum += c[k] * In::load(rows[k] + i, w);
    add_to(total + i, w, sum);
  };
  constexpr int64_t kLine = 64 / sizeof(T);
  int64_t i = 0;
  for (; i + kLine <= n; i += kLine) {
#pragma GCC unroll 8
    for (int k = 0; sizeof(T) < sizeof(double) && k < K; ++k)
      __builtin_prefetch(rows[k] + ahead + i, 0, 2);
#pragma GCC unroll 8
    for (int64_t j = 0; j < kLine; j += In::kCount) add(i + j, Count<In::kCount>{});
  }
  each<In::kCount>(i, n, add);
}

// The same for `count` rows. wide, and factors near or beyond the ends of float32's range: in
// float64.
template <class T>
void add_block(int64_t count, const T* const* rows, const double* factors, bool wide, int64_t n,
               double* total, int64_t ahead) {
  for (int64_t k = 0; k < count; ++k)
    wide |= !(__builtin_fabs(factors[k]) > 0x1p-100 && __builtin_fabs(factors[k]) < 0x1p+100);
  if (wide) {
    for (int64_t k = 0; k < count; ++k) add_scaled(rows[k], factors[k], n, total);
    return;
  }
  switch (count) {
    case 1:
      return add_rows<1>(rows, factors, n, total, ahead);
    case 2:
      return add_rows<2>(rows, factors, n, total, ahead);
    case 3:
      return add_rows<3>(rows, factors, n, total, ahead);
    case 4:
      return add_rows<4>(rows, factors, n, total, ahead);
  }
}

// Adds the samples [begin, end) of the columns [column, column + n) of a tensor. `begin` is a
// multiple of kBlock. Samples of factor zero are not looked at. The samples `ahead` are fetched.
// wide: float32 may not hold their sums.
template <class T>
void add_samples(const SampleTensor& tensor, const double* factors, bool wide, int64_t begin,
                 int64_t end, int64_t column, int64_t n, double* total, int64_t ahead) {
  const T* const grad = static_cast<const T*>(tensor.grad.data) + column;
  for (int64_t first = begin; first < end; first += kBlock) {
    const T* rows[kBlock];
    double chosen[kBlock];
    int64_t count = 0;
    for (int64_t b = first; b < end && b < first + kBlock; ++b) {
      if (factors[b] == 0) continue;
      rows[count] = grad + b * tensor.width;
      chosen[count++] = factors[b];
    }
    add_block(count, rows, chosen, wide, n, total, ahead * tensor.width);
  }
}

struct Tile {
  int64_t tensor;
  int64_t column;  // within the tensor
  int64_t width;
  int64_t start;  // within all columns of the list
};

// One list under one norm per sample. norms: [batch] in float64.
void clip(const SampleList& list, int64_t batch, ClipMode mode, double bound, double gamma,
          const ConstData& weights, double* norms, ParallelFor parallel_for) {
  Scratch<double> factors(batch);
  // Wide samples are no better off in groups: then all norms come first, and a second read.
  const bool grouped = list.bytes * kBlock <= kGroupBytes;
  int64_t group = batch;
  if (grouped && list.bytes > 0) group = kGroupBytes / list.bytes / kBlock * kBlock;
  if (group > batch) group = batch;
  const bool one_group = group >= batch;

  int64_t tile_width = list.width / 8;  // several tiles even for few columns
  tile_width = tile_width > kTile ? kTile : tile_width < 64 ? 64 : (tile_width + 15) / 16 * 16;
  int64_t tiles = 0;
  for (int64_t t = 0; t < list.count; ++t)
    tiles += (list.tensors[t].width + tile_width - 1) / tile_width;
  Scratch<Tile> tile(tiles);
  int64_t made = 0, start = 0;
  for (int64_t t = 0; t < list.count; ++t)
    for (int64_t column = 0; column < list.tensors[t].width; column += tile_width) {
      const int64_t rest = list.tensors[t].width - column;
      const int64_t width = rest < tile_width ? rest : tile_width;
      tile[made++] = {t, column, width, start};
      start += width;
    }
  Scratch<double> totals(one_group ? 0 : list.width);

  // The norms of the next group are taken while this one is added: the one waits for memory, the
  // other for the cache.
  Scratch<double> parts(one_group ? 0 : tiles * group);
  const auto take_squares = [&](int64_t t, int64_t begin, int64_t end) {
    const SampleTensor& tensor = list.tensors[tile[t].tensor];
    with_type(tensor.grad.dtype, [&]<class T>(T*) {
      const T* const rows = static_cast<const T*>(tensor.grad.data) + tile[t].column;
      for (int64_t b = begin; b < end; ++b)
        parts[t * (end - begin) + b - begin] =
            list.squares_of(rows + b * tensor.width, tile[t].width);
    });
  };
  const auto until = [&](int64_t begin) { return begin + group < batch ? begin + group : batch; };

  sample_norms(list, 0, until(0), norms, parallel_for);
  int64_t first = 0;
  do {
    const int64_t last = until(first), next = until(last);
    bool wide = false;
    for (int64_t b = first; b < last; ++b) {
      const double weight = weights.data ? element(weights, b) : 1;
      factors[b] = weight == 0
                       ? 0
                       : weight * clip_factor(mode == ClipMode::automatic, norms[b], bound, gamma);
      wide |= factors[b] != 0 && !(__builtin_fabs(factors[b]) * norms[b] < 0x1p+120);
    }
    const auto body = [&](int64_t begin, int64_t end) {
      double local[kTile];
      for (int64_t i = begin; i < end; ++i) {
        const Tile& part = tile[i];
        const SampleTensor& tensor = list.tensors[part.tensor];
        double* const total = one_group ? local : totals.get() + part.start;
        if (first == 0)
          for (int64_t c = 0; c < part.width; ++c) total[c] = 0;
        with_type(tensor.grad.dtype, [&]<class T>(T*) {
          add_samples<T>(tensor, factors.get(), wide, first, last, part.column, part.width, total,
                         next - last);
          if (last == batch) {
            T* const sum = static_cast<T*>(tensor.sum.data) + part.column;
            each(0, part.width, [&](int64_t c, auto w) { store(sum + c, w, load(total + c, w)); });
          }
        });
        if (last < batch) take_squares(i, last, next);
      }
    };
    parallel(parallel_for, tiles, kGrain / (1 + (next - first) * tile_width) + 1, body);
    if (last < batch) norms_from_parts(list, last, next - last, parts.get(), tiles, norms + last);
    first = last;
  } while (first < batch);
}

void clip_per_layer(const ClipArgs& args, ParallelFor parallel_for) {
  // Small tensors are spread over the threads whole; the work inside a large one is.
  const auto one = [&](int64_t t, ParallelFor inner) {
    Scratch<double> norms(args.batch);
    clip(SampleList(args.tensors + t, 1, args.norms.dtype == Dtype::f64), args.batch,
         ClipMode::per_layer, args.max_norm[t], 0, args.weights, norms.get(), inner);
    for (int64_t b = 0; b < args.batch; ++b) put(args.norms, b * args.count + t, norms[b]);
  };
  const auto large = [&](int64_t t) { return args.batch * args.tensors[t].width > 8 * kGrain; };
  parallel(parallel_for, args.count, 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t)
      if (!large(t)) one(t, nullptr);
  });
  for (int64_t t = 0; t < args.count; ++t)
    if (large(t)) one(t, parallel_for);
}

}  // namespace

void EMBATTLE_AT_LEVEL(per_sample_norm)(const SampleNormArgs& args, ParallelFor parallel_for) {
  Scratch<double> norms(args.batch);
  sample_norms(SampleList(args.tensors, args.count, args.norms.dtype == Dtype::f64), 0, args.batch,
               norms.get(), parallel_for);
  for (int64_t b = 0; b < args.batch; ++b) put(args.norms, b, norms[b]);
}

void EMBATTLE_AT_LEVEL(clip_and_sum)(const ClipArgs& args, ParallelFor parallel_for) {
  if (args.mode == ClipMode::per_layer) return clip_per_layer(args, parallel_for);
  Scratch<double> norms(args.batch);
  clip(SampleList(args.tensors, args.count, args.norms.dtype == Dtype::f64), args.batch, args.mode,
       args.max_norm[0], args.gamma, args.weights, norms.get(), parallel_for);
  for (int64_t b = 0; b < args.batch; ++b) put(args.norms, b, norms[b]);
}

}  // namespace embattle
