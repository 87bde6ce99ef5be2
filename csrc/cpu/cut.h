// Groups as ranges of elements: who works on what.
#pragma once

#include "elements.h"

namespace embattle {
namespace {

// A thread's share of elements that is worth waking it up for.
constexpr int64_t kGrain = 32768;
constexpr int kMaxBlocks = 256;

// Calls f(begin, end) for shares of [0, count), of at least `grain`. parallel_for null: on this
// thread.
template <class F>
inline void parallel(ParallelFor parallel_for, int64_t count, int64_t grain, const F& f) {
  if (!parallel_for || count <= grain) {
    if (count > 0) f(int64_t{0}, count);
    return;
  }
  parallel_for(
      count, grain,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<const F*>(context))(begin, end);
      },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// Calls f(i, n) for the vectors of elements [begin, end), of doubles or of kCount; n is below that
// for the last one.
template <int kCount = kLanes, class F>
EMBATTLE_INLINE inline void each(int64_t begin, int64_t end, const F& f) {
  int64_t i = begin;
  for (; i + kCount <= end; i += kCount) f(i, Count<kCount>{});
  if (i < end) f(i, static_cast<int>(end - i));
}

struct Cut {
  const Groups& groups;
  int64_t index;             // which group
  int64_t first, last;       // its rows
  ParallelFor parallel_for;  // null: this thread works alone

  int64_t begin() const { return first * groups.dim; }
  int64_t end() const { return last * groups.dim; }

  // Elements per block.
  int64_t block() const {
    const int64_t even = (end() - begin() + kMaxBlocks - 1) / kMaxBlocks;
    return even < kGrain ? kGrain : (even + 63) / 64 * 64;
  }

  // The number of elements that take part.
  int64_t count() const {
    if (!groups.mask) return end() - begin();
    int64_t rows = 0;
    for (int64_t row = first; row < last; ++row) rows += groups.mask[row];
    return rows * groups.dim;
  }

  // Calls f(begin, end) for the runs of elements of [low, high) that take part (or do not).
  template <class F>
  void runs(int64_t low, int64_t high, const F& f, bool taking_part = true) const {
    const int64_t dim = groups.dim;
    if (!groups.mask) {
      if (taking_part && low < high) f(low, high);
      return;
    }
    for (int64_t at = low; at < high;) {
      int64_t row = at / dim;
      if (groups.mask[row] != taking_part) {
        at = (row + 1) * dim;
        continue;
      }
      while (row < last && groups.mask[row] == taking_part) ++row;
      const int64_t stop = row * dim < high ? row * dim : high;
      f(at, stop);
      at = stop;
    }
  }

  // Calls f(block, low, high) for every block, on any thread.
  template <class F>
  int blocks(const F& f, bool backwards = false) const {
    const int64_t size = block(), from = begin(), to = end();
    const int64_t count = (to - from + size - 1) / size;
    parallel(parallel_for, count, parallel_for ? 1 : count, [&](int64_t b, int64_t stop) {
      for (; b < stop; ++b) {
        const int64_t at = backwards ? count - 1 - b : b;
        const int64_t low = from + at * size;
        f(static_cast<int>(at), low, low + size < to ? low + size : to);
      }
    });
    return static_cast<int>(count);
  }
};

// Calls f(i, n) for all vectors of the group that take part (or do not), on any thread.
template <class F>
inline void for_elements(const Cut& cut, const F& f, bool taking_part = true) {
  cut.blocks([&](int, int64_t low, int64_t high) {
    cut.runs(low, high, [&](int64_t begin, int64_t end) { each(begin, end, f); }, taking_part);
  });
}

inline Cut cut_of(const Groups& groups, int64_t g, ParallelFor team) {
  const int64_t first = groups.offsets ? groups.offsets[g] : g * groups.rows_per_group;
  const int64_t last = groups.offsets ? groups.offsets[g + 1] : first + groups.rows_per_group;
  return {groups, g, first, last, team};
}

// A share of the groups: few big ones, one after the other with all threads on each (team: how to
// call them), or many groups for one thread (team: null).
struct Share {
  const Groups& groups;
  int64_t begin, end;
  ParallelFor team;
};

// Calls f(share) for shares of all groups, on any thread.
template <class F>
inline void for_shares(const Groups& groups, ParallelFor parallel_for, const F& f) {
  if (groups.groups <= 0) return;
  const int64_t mean = groups.rows * groups.dim / groups.groups;
  const bool split = mean >= (groups.groups < 16 ? int64_t{1} << 17 : int64_t{1} << 20);
  if (split) return f(Share{groups, 0, groups.groups, parallel_for});
  parallel(parallel_for, groups.groups, kGrain / (mean > 0 ? mean : 1) + 1,
           [&](int64_t begin, int64_t end) { f(Share{groups, begin, end, nullptr}); });
}

// Calls f(cut) for every group.
template <class F>
inline void for_groups(const Groups& groups, ParallelFor parallel_for, const F& f) {
  for_shares(groups, parallel_for, [&](const Share& share) {
    for (int64_t g = share.begin; g < share.end; ++g) f(cut_of(groups, g, share.team));
  });
}

inline double of_group(const PerGroup& value, int64_t group) {
  if (!value.values) return value.value;
  const int64_t i = value.broadcast ? 0 : group;
  return value.dtype == Dtype::f64 ? static_cast<const double*>(value.values)[i]
                                   : static_cast<const float*>(value.values)[i];
}

}  // namespace
}  // namespace embattle
