// project and project_: one read, one write.
#include "ball.h"

namespace embattle {
namespace {

template <class P>
struct Perturbation {
  const typename P::Element* x;
  const P& place;

  template <class N>
  V given(int64_t i, N n) const {
    return load(x + i, n);
  }
  template <class N>
  V z(int64_t i, N n) const {
    return given(i, n) - place.origin(i, n);
  }
};

template <class T, bool kPlain>
void run(const ProjectArgs& args, ParallelFor parallel_for) {
  with_norm(args.norm, [&](auto of) {
    for_groups(args.groups, 0, args.groups.groups, parallel_for, [&](const Cut& cut) {
      const Place<T, kPlain> place(args.out, args.box);
      const Perturbation<Place<T, kPlain>> source{static_cast<const T*>(args.delta.data), place};
      finish<decltype(of)::norm>(cut, of_group(args.eps, cut.index), place, source);
    });
  });
}

}  // namespace

void EMBATTLE_AT_LEVEL(project)(const ProjectArgs& args, ParallelFor parallel_for) {
  with_type(args.delta.dtype, [&](auto as) {
    typedef typename decltype(as)::type T;
    is_plain(args.box) ? run<T, true>(args, parallel_for) : run<T, false>(args, parallel_for);
  });
}

}  // namespace embattle
