// Many short groups in float lanes: as many at a time as a vector of doubles has lanes, so that
// what is worked out once per group is worked out for all of them at once. The arithmetic is that
// of plain.h, to the bit, whichever groups go together.
#pragma once

#include "plain.h"

namespace embattle {
namespace {

// Elements of a short group, at most.
constexpr int64_t kShort = 1024;

inline int64_t mean_extent(const Groups& groups) {
  return groups.groups > 0 ? groups.rows * groups.dim / groups.groups : 0;
}
inline bool are_short(const Groups& groups) {
  const int64_t extent = groups.rows_per_group * groups.dim;
  return !groups.offsets && !groups.mask && extent >= kFewest && extent <= kShort;
}

inline V per_group(const PerGroup& value, int64_t first, int count) {
  V x{};
  for (int k = 0; k < count; ++k) x[k] = of_group(value, first + k);
  return x;
}

inline I fits_float(V x) {
  const V size = abs(x);
  return (size > 0x1p-60) & (size < 0x1p60);
}

// Sees to it that groups [first, first + count) lie in their balls; lane k holds a group's sum of
// squares in float lanes, or 0 where something else has seen to it.
template <class T>
inline void keep_rows_inside(const Groups& groups, int64_t first, int count, V eps, T* to, V sums) {
  const double vanished = static_cast<double>(groups.rows_per_group * groups.dim) * 0x1p-148;
  const I doubt = sums * (1 + kSumError) + vanished > eps * eps;
  for (int k = 0; k < count; ++k)
    if (doubt[k] && sums[k] > 0)
      keep_inside<Norm::l2>(cut_of(groups, first + k, nullptr), eps[k], to, sums[k]);
}

// Steps and projects groups [first, first + count), count <= kLanes. `alone(cut)` takes a group
// that float lanes do not serve. Preconditions: are_short; neither origin nor box.
template <class T, class A>
inline void step_rows_l2(const StepArgs& args, int64_t first, int count, const Sink<T>& out,
                         const A& alone) {
  const int64_t extent = args.groups.rows_per_group * args.groups.dim;
  const T* const x = static_cast<const T*>(args.delta.data);
  const T* const grad = static_cast<const T*>(args.grad.data);
  V gg_parts[kLanes] = {}, gd_parts[kLanes] = {}, dd_parts[kLanes] = {};
  for (int k = 0; k < count; ++k) {
    Terms<3> terms;
    terms.add((first + k) * extent, (first + k + 1) * extent,
              [=](int64_t i, auto n, F* to) EMBATTLE_INLINE {
                const F g = fetch(grad + i, n), d = fetch(x + i, n);
                to[0] = g * g;
                to[1] = g * d;
                to[2] = d * d;
              });
    gg_parts[k] = terms.acc[0];
    gd_parts[k] = terms.acc[1];
    dd_parts[k] = terms.acc[2];
  }
  const V gg = sums_of(gg_parts), gd = sums_of(gd_parts), dd = sums_of(dd_parts);
  const V eps = per_group(args.eps, first, count);
  const V length_g = root(gg), a = per_group(args.step_size, first, count) / length_g;
  const V reach = root(dd) + abs(a) * length_g, square = dd + 2 * a * gd + a * a * gg;
  const V norm = root(square);
  const V goal = eps * aim(kUnit<T>, extent) * (1 - 2 * kSumError);
  // What reaches the goal would leave it to rounding whether it is inside: FGM's steps end at eps.
  const V scale = norm > goal ? goal / norm : splat(1), t = scale * a;
  const double n = static_cast<double>(extent);
  const I good = (gg >= n * 0x1p-100) & (gg < kInfinity) & (dd < kInfinity) &
                 (square >= 0.25 * reach * reach) & (square >= n * 0x1p-120) &
                 (square < kInfinity) & fits_float(scale) & (fits_float(t) | (t == 0));
  V sizes[kLanes] = {};
  for (int k = 0; k < count; ++k) {
    if (!good[k]) {
      alone(cut_of(args.groups, first + k, nullptr));
      continue;
    }
    const F by = all(static_cast<float>(scale[k])), along = all(static_cast<float>(t[k]));
    Terms<1> terms;
    terms.add((first + k) * extent, (first + k + 1) * extent,
              [=](int64_t i, auto w, F* to) EMBATTLE_INLINE {
                const F z = out.store(i, w, fetch(x + i, w) * by + fetch(grad + i, w) * along);
                to[0] = z * z;
              });
    sizes[k] = terms.acc[0];
  }
  keep_rows_inside(args.groups, first, count, eps, out.p, sums_of(sizes));
}

// Projects them likewise.
template <class T, class A>
inline void project_rows_l2(const ProjectArgs& args, int64_t first, int count, const Sink<T>& out,
                            const A& alone) {
  const int64_t extent = args.groups.rows_per_group * args.groups.dim;
  const T* const x = static_cast<const T*>(args.delta.data);
  V parts[kLanes] = {};
  for (int k = 0; k < count; ++k) {
    Terms<1> terms;
    terms.add((first + k) * extent, (first + k + 1) * extent,
              [=](int64_t i, auto n, F* to) EMBATTLE_INLINE {
                const F d = fetch(x + i, n);
                to[0] = d * d;
              });
    parts[k] = terms.acc[0];
  }
  const V square = sums_of(parts), norm = root(square);
  const V eps = per_group(args.eps, first, count);
  const V scale = eps * aim(kUnit<T>, extent) * (1 - 2 * kSumError) / norm;
  // Where float sums leave it open whether the group is inside it goes alone.
  const I stays = norm * (1 + kSumError) <= eps, moves = norm > eps * (1 + kSumError);
  const I good = (square >= static_cast<double>(extent) * 0x1p-120) & (square < kInfinity) &
                 (stays | (moves & fits_float(scale)));
  V sizes[kLanes] = {};
  for (int k = 0; k < count; ++k) {
    if (!good[k]) {
      alone(cut_of(args.groups, first + k, nullptr));
      continue;
    }
    if (stays[k]) {
      copy_group(cut_of(args.groups, first + k, nullptr), x, out);
      continue;
    }
    const F by = all(static_cast<float>(scale[k]));
    Terms<1> terms;
    terms.add((first + k) * extent, (first + k + 1) * extent,
              [=](int64_t i, auto n, F* to) EMBATTLE_INLINE {
                const F z = out.store(i, n, fetch(x + i, n) * by);
                to[0] = z * z;
              });
    sizes[k] = terms.acc[0];
  }
  keep_rows_inside(args.groups, first, count, eps, out.p, sums_of(sizes));
}

inline bool is_one_number(const PerGroup& value) { return !value.values || value.broadcast; }

// Calls f(cut) for stretches of groups that are treated as one, which linf allows where they share
// their numbers.
template <class F>
inline void stretches_of_groups(const Groups& groups, int64_t begin, int64_t end, const F& f) {
  const int64_t many = 4096 / (mean_extent(groups) + 1) + 1;
  for (int64_t g = begin; g < end; g += many) {
    Cut cut = cut_of(groups, g, nullptr);
    cut.last = cut_of(groups, (g + many < end ? g + many : end) - 1, nullptr).last;
    f(cut, g, g + many < end ? g + many : end);
  }
}

// Projects groups [begin, end) if there is a way for short ones. `alone(cut)` takes one group.
template <Norm kNorm, class T, class A>
inline bool project_rows(const ProjectArgs& args, int64_t begin, int64_t end, const A& alone) {
  const Groups& groups = args.groups;
  return with_short_type<T>(args.delta.dtype, [&](auto* type) {
    typedef std::remove_pointer_t<decltype(type)> S;
    const S* const x = static_cast<const S*>(args.delta.data);
    const Sink<S> out(args.out, x, groups.rows, groups.dim);
    if (kNorm == Norm::linf && mean_extent(groups) <= kShort && is_one_number(args.eps)) {
      stretches_of_groups(groups, begin, end, [&](const Cut& cut, int64_t, int64_t) {
        project_linf(cut, of_group(args.eps, 0), x, out);
        clear_masked(cut, out.p);
      });
      return true;
    }
    if (kNorm == Norm::l2 && are_short(groups)) {
      for (int64_t g = begin; g < end; g += kLanes)
        project_rows_l2(args, g, static_cast<int>(end - g < kLanes ? end - g : kLanes), out, alone);
      out.settle();
      return true;
    }
    return false;
  });
}

// Steps and projects likewise.
template <Norm kNorm, class T, class A>
inline bool step_rows(const StepArgs& args, int64_t begin, int64_t end, const A& alone) {
  const Groups& groups = args.groups;
  if (args.delta.dtype != args.grad.dtype) return false;
  return with_short_type<T>(args.delta.dtype, [&](auto* type) {
    typedef std::remove_pointer_t<decltype(type)> S;
    const S* const x = static_cast<const S*>(args.delta.data);
    const S* const grad = static_cast<const S*>(args.grad.data);
    const Sink<S> out(args.out, x, groups.rows, groups.dim);
    if (kNorm == Norm::linf && mean_extent(groups) <= kShort && is_one_number(args.eps) &&
        is_one_number(args.step_size)) {
      stretches_of_groups(groups, begin, end, [&](const Cut& cut, int64_t from, int64_t to) {
        if (step_linf(cut, of_group(args.step_size, 0), of_group(args.eps, 0), x, grad, out))
          return clear_masked(cut, out.p);
        for (int64_t g = from; g < to; ++g) alone(cut_of(groups, g, nullptr));
      });
      return true;
    }
    if (kNorm == Norm::l2 && are_short(groups)) {
      for (int64_t g = begin; g < end; g += kLanes)
        step_rows_l2(args, g, static_cast<int>(end - g < kLanes ? end - g : kLanes), out, alone);
      out.settle();
      return true;
    }
    return false;
  });
}

}  // namespace
}  // namespace embattle
