// Norms of groups, in one read of the input (in two, for linf, where it is not finite).
#include "ball.h"
#include "batch.h"

namespace embattle {
namespace {

// For linf, in double lanes: the largest size, which passes NaNs over; and zero, or a NaN where an
// element is not finite.
inline void add_largest(V v, V* acc) {
  acc[0] = larger(abs(v), acc[0]);
  acc[1] += v * 0.;
}

template <Norm kNorm, class T>
inline double norm_of_group(const Cut& cut, const T* x) {
  const auto value = [=](int64_t i, auto n) { return load(x + i, n); };
  if constexpr (kNorm != Norm::linf) {
    return length<kNorm>(cut, value);
  } else {
    Totals<2, 1> found;
    if constexpr (std::is_same_v<T, double>)
      found =
          totals<2, 1>(cut, [=](int64_t i, auto n, V* acc) { add_largest(load(x + i, n), acc); });
    else
      found = float_sums<2, 1>(cut, [=](int64_t i, auto n, F* to) EMBATTLE_INLINE {
        const F v = fetch(x + i, n);
        to[0] = abs(v);
        to[1] = v * 0.f;
      });
    return found.v[1] == 0 ? found.v[0] : length<Norm::l1>(cut, value);
  }
}

// Up to which length of the groups as many are taken at a time as a V has lanes.
constexpr int64_t most_together(Norm norm) {
  return norm == Norm::linf ? 2 * kFewest : kShort;  // float lanes are faster for linf then
}

// The norms of a few groups, a lane for each; the bits are those of norm_of_group. Precondition:
// neither offsets nor a mask.
template <Norm kNorm, class T>
inline void norms_together(const Groups& groups, int64_t first, int count, const T* x,
                           const Elements<Any>& out) {
  const int64_t extent = groups.rows_per_group * groups.dim;
  V parts[kLanes] = {}, norms{};
  for (int k = 0; k < count; ++k) {
    const int64_t begin = (first + k) * extent, end = begin + extent;
    if constexpr (kNorm == Norm::linf) {
      V lanes[2];
      lanes_of_run<2, 1>(
          begin, end, [=](int64_t i, auto n, V* acc) { add_largest(load(x + i, n), acc); }, lanes);
      norms[k] = largest(lanes[0]);
      parts[k] = lanes[1];
    } else {
      V lanes[1];
      lanes_of_run<1>(
          begin, end, [=](int64_t i, auto n, V* acc) { add_length<kNorm>(load(x + i, n), acc[0]); },
          lanes);
      parts[k] = lanes[0];
    }
  }
  const V sums = sums_of(parts);
  if (kNorm != Norm::linf) norms = kNorm == Norm::l2 ? root(sums) : sums;
  const I good = kNorm == Norm::linf ? sums == 0
                 : kNorm == Norm::l2 ? (sums > 1e-280) & (sums < 1e300)
                                     : sums == sums;
  out.store(first, count, norms);
  for (int k = 0; k < count; ++k)
    if (!good[k])
      out.store(first + k, 1, splat(norm_of_group<kNorm>(cut_of(groups, first + k, nullptr), x)));
}

}  // namespace

void EMBATTLE_AT_LEVEL(group_norm)(const NormArgs& args, ParallelFor parallel_for) {
  const Elements<Any> out(args.out);
  with_type(args.x.dtype, [&]<class T>(T*) {
    const T* const x = static_cast<const T*>(args.x.data);
    with_norm(args.norm, [&]<Norm kNorm>(Of<kNorm>) {
      const Groups& groups = args.groups;
      if (groups.offsets || groups.mask ||
          groups.rows_per_group * groups.dim > most_together(kNorm)) {
        for_groups(groups, parallel_for, [&](const Cut& cut) {
          out.store(cut.index, 1, splat(norm_of_group<kNorm>(cut, x)));
        });
        return;
      }
      for_shares(groups, parallel_for, [&](const Share& share) {
        for (int64_t g = share.begin; g < share.end; g += kLanes) {
          const int64_t left = share.end - g;
          norms_together<kNorm>(groups, g, left < kLanes ? int(left) : kLanes, x, out);
        }
      });
    });
  });
}

}  // namespace embattle
