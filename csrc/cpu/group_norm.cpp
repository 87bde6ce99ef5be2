// Norms of groups, in one read of the input.
#include "ascent.h"

namespace embattle {

void EMBATTLE_AT_LEVEL(group_norm)(const NormArgs& args, ParallelFor parallel_for) {
  with_type(args.x.dtype, [&](auto as) {
    typedef typename decltype(as)::type T;
    with_norm(args.norm, [&](auto of) {
      for_groups(args.groups, 0, args.groups.groups, parallel_for, [&](const Cut& cut) {
        const auto x = [&](int64_t i, auto n) { return load<T>(args.x.data, i, n); };
        constexpr Norm kind = decltype(of)::norm;
        double norm = length<kind>(cut, x);
        // A maximum passes NaNs over; a sum does not.
        if (kind == Norm::linf && !all_finite(cut, x)) norm = length<Norm::l1>(cut, x);
        store(args.out, cut.index, 1, splat(norm));
      });
    });
  });
}

}  // namespace embattle
