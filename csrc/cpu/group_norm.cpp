// Norms of groups, in one read of the input.
#include "ascent.h"

namespace embattle {

void EMBATTLE_AT_LEVEL(group_norm)(const NormArgs& args, ParallelFor parallel_for) {
  const Elements<Any> out(args.out);
  with_elements({const_cast<void*>(args.x.data), args.x.dtype}, [&](auto elements) {
    with_norm(args.norm, [&](auto of) {
      for_groups(args.groups, 0, args.groups.groups, parallel_for, [&](const Cut& cut) {
        constexpr Norm kind = decltype(of)::norm;
        const auto x = [&](int64_t i, auto n) { return elements.load(i, n); };
        double norm = length<kind>(cut, x);
        // A maximum passes NaNs over; a sum does not.
        if (kind == Norm::linf && !all_finite(cut, x)) norm = length<Norm::l1>(cut, x);
        out.store(cut.index, 1, splat(norm));
      });
    });
  });
}

}  // namespace embattle
