// Norms of groups, in one read of the input (in two, for linf, where it is not finite).
#include "ascent.h"
#include "inside.h"

namespace embattle {
namespace {

// The largest size, which passes NaNs over; and zero, or a NaN where an element is not finite.
template <class E>
inline Totals<2> largest_of(const Cut& cut, const E& x) {
  return totals<2, 1>(cut, [&](int64_t i, auto n, V* acc) {
    const V v = x(i, n);
    acc[0] = larger(abs(v), acc[0]);
    acc[1] += v * 0.;
  });
}

// The same in float lanes.
template <class T>
inline Totals<2> largest_of_floats(const Cut& cut, const T* x) {
  return float_sums<2, 1>(cut, [=](int64_t i, auto n, F* to) EMBATTLE_INLINE {
    const F v = fetch(x + i, n);
    to[0] = abs(v);
    to[1] = v * 0.f;
  });
}

}  // namespace

void EMBATTLE_AT_LEVEL(group_norm)(const NormArgs& args, ParallelFor parallel_for) {
  const Elements<Any> out(args.out);
  with_elements({const_cast<void*>(args.x.data), args.x.dtype}, [&](auto elements) {
    with_norm(args.norm, [&](auto of) {
      for_groups(args.groups, 0, args.groups.groups, parallel_for, [&](const Cut& cut) {
        constexpr Norm kind = decltype(of)::norm;
        const auto x = [&](int64_t i, auto n) { return elements.load(i, n); };
        double norm;
        if constexpr (kind == Norm::linf) {
          typedef std::remove_cv_t<std::remove_pointer_t<decltype(elements.p)>> T;
          Totals<2> found;
          if constexpr (std::is_same_v<T, double>)
            found = largest_of(cut, x);
          else
            found = largest_of_floats(cut, static_cast<const T*>(args.x.data));
          norm = found.v[1] == 0 ? found.v[0] : length<Norm::l1>(cut, x);
        } else {
          norm = length<kind>(cut, x);
        }
        out.store(cut.index, 1, splat(norm));
      });
    });
  });
}

}  // namespace embattle
