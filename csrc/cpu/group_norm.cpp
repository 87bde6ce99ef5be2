// Norms of groups, in one read of the input (in two, for linf, where it is not finite).
#include "ball.h"

namespace embattle {
namespace {

template <Norm kNorm, class T>
inline double norm_of_group(const Cut& cut, const T* x) {
  const auto value = [=](int64_t i, auto n) { return load(x + i, n); };
  if constexpr (kNorm != Norm::linf) {
    return length<kNorm>(cut, value);
  } else {
    // The largest size, which passes NaNs over; and zero, or a NaN where an element is not finite.
    Totals<2, 1> found;
    if constexpr (std::is_same_v<T, double>)
      found = totals<2, 1>(cut, [=](int64_t i, auto n, V* acc) {
        const V v = load(x + i, n);
        acc[0] = larger(abs(v), acc[0]);
        acc[1] += v * 0.;
      });
    else
      found = float_sums<2, 1>(cut, [=](int64_t i, auto n, F* to) EMBATTLE_INLINE {
        const F v = fetch(x + i, n);
        to[0] = abs(v);
        to[1] = v * 0.f;
      });
    return found.v[1] == 0 ? found.v[0] : length<Norm::l1>(cut, value);
  }
}

}  // namespace

void EMBATTLE_AT_LEVEL(group_norm)(const NormArgs& args, ParallelFor parallel_for) {
  const Elements<Any> out(args.out);
  with_type(args.x.dtype, [&]<class T>(T*) {
    const T* const x = static_cast<const T*>(args.x.data);
    with_norm(args.norm, [&]<Norm kNorm>(Of<kNorm>) {
      for_groups(args.groups, parallel_for, [&](const Cut& cut) {
        out.store(cut.index, 1, splat(norm_of_group<kNorm>(cut, x)));
      });
    });
  });
}

}  // namespace embattle
