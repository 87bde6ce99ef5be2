// Which groups float lanes take, and which of them together. What they do not take goes to the
// double lanes, group by group: an origin or a box, float64, two types, and numbers with which
// float32 does not do.
#pragma once

#include "inside.h"

namespace embattle {
namespace {

// Elements of a short group, at most.
constexpr int64_t kShort = 1024;

// Consecutive groups. Lane k of a V is a number of the k-th of them.
struct Batch {
  const Groups& groups;
  int64_t first;
  int count;
  ParallelFor team;  // as a Cut's; null unless the group is alone

  Cut cut(int k) const { return cut_of(groups, first + k, team); }
  // All of them as if they were one.
  Cut joined() const {
    Cut all = cut(0);
    all.last = count > 1 ? cut(count - 1).last : all.last;
    return all;
  }
  V numbers(const PerGroup& value) const {
    V x{};
    for (int k = 0; k < count; ++k) x[k] = of_group(value, first + k);
    return x;
  }
};

inline bool is_one_number(const PerGroup& value) { return !value.values || value.broadcast; }
inline bool are_short(const Groups& groups) {
  const int64_t extent = groups.rows_per_group * groups.dim;
  return !groups.offsets && !groups.mask && extent >= kFewest && extent <= kShort;
}

// The table. How many groups go together, at most:
//
//   linf, short on average, the same numbers for all (`alike`)    4096 elements, as if one group
//   l2, of one length and short, no mask                          as many as a V has lanes
//   others                                                        one
//   l2 and l1, of one length below kFewest                        none: double lanes
inline int64_t batch_size(const Groups& groups, Norm norm, bool alike) {
  const int64_t mean = groups.groups > 0 ? groups.rows * groups.dim / groups.groups : 0;
  if (norm == Norm::linf) return alike && mean <= kShort ? 4096 / (mean + 1) + 1 : 1;
  if (!groups.offsets && mean < kFewest) return 0;
  return norm == Norm::l2 && are_short(groups) ? kLanes : 1;
}

// Takes a share's groups in batches of `size`. floats(batch, sink) writes the groups in float
// lanes, but for masked rows, or returns false with nothing written; in_double(cut) takes a group
// in double lanes. `from` is where the input lies. T: what the kernel is compiled for.
template <class T, class Fn, class D>
inline void take_share(const Share& share, int64_t size, const Data& to, const void* from,
                       const Fn& floats, const D& in_double) {
  const Groups& groups = share.groups;
  const bool done = size > 0 && with_short_type<T>(to.dtype, [&]<class S>(S*) {
                      const Sink<S> out(to, from, groups.rows, groups.dim);
                      const auto take = [&](int64_t first, int64_t count) {
                        const Batch batch{groups, first, static_cast<int>(count), share.team};
                        if (!floats(batch, out)) return false;
                        clear_masked(batch.joined(), out.p);
                        return true;
                      };
                      const int64_t step = share.team ? 1 : size;
                      for (int64_t g = share.begin; g < share.end; g += step) {
                        const int64_t count = g + step < share.end ? step : share.end - g;
                        if (take(g, count)) continue;
                        for (int64_t k = g; k < g + count; ++k)
                          if (count == 1 || !take(k, 1)) in_double(cut_of(groups, k, share.team));
                      }
                      out.settle();
                      return true;
                    });
  for (int64_t g = share.begin; g < share.end && !done; ++g)
    in_double(cut_of(groups, g, share.team));
}

// What f(numbers...) gives for every group: of one that is alone in double, which takes less time.
template <class Fn, class... E>
EMBATTLE_INLINE inline V per_group(const Batch& batch, const Fn& f, E... numbers) {
  return batch.count == 1 ? first_lanes(f(numbers[0]...), 1) : f(numbers...);
}

// Lane k of sums[j]: the j-th sum of the terms f(k) of the k-th group; zero where `taken` is. All
// are short, or there is but one. kBackwards, settle: as for float_sums; of short groups the caller
// settles.
template <int K, bool kBackwards = false, class Fn, class S>
inline void batch_sums(const Batch& batch, I taken, V (&sums)[K], const Fn& f, const S& settle) {
  if (batch.count == 1) {
    const auto alone =
        taken[0] ? float_sums<K, kBackwards>(batch.cut(0), f(0), settle) : Totals<K>{};
    for (int j = 0; j < K; ++j) sums[j] = first_lanes(alone.v[j], 1);
    return;
  }
  const int64_t extent = batch.groups.rows_per_group * batch.groups.dim;
  V parts[K][kLanes];
  for (int k = 0; k < kLanes; ++k) {
    Terms<K> terms;
    if (k < batch.count && taken[k])
      terms.add((batch.first + k) * extent, (batch.first + k + 1) * extent, f(k));
    for (int j = 0; j < K; ++j) parts[j][k] = terms.acc[j];
  }
  for (int j = 0; j < K; ++j) sums[j] = sums_of(parts[j]);
}

}  // namespace
}  // namespace embattle
