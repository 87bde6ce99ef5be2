// project and project_: one read, one write.
#include "short_rows.h"

namespace embattle {
namespace {

template <class P>
struct Perturbation {
  typename P::Tensor x;
  const P& place;

  template <class N>
  V given(int64_t i, N n) const {
    return x.load(i, n);
  }
  template <class N>
  V z(int64_t i, N n) const {
    return given(i, n) - place.origin(i, n);
  }
};

template <class T, bool kPlain>
void run(const ProjectArgs& args, ParallelFor parallel_for) {
  typedef Place<T, kPlain> P;
  const P place(args.out, args.box);
  const Perturbation<P> source{typename P::Tensor(args.delta), place};
  const bool plain = is_plain(args.box);
  with_norm(args.norm, [&](auto of) {
    constexpr Norm norm = decltype(of)::norm;
    const auto alone = [&](const Cut& cut) {
      if constexpr (!is_boxed_float<P>)
        if (plain && plain_project<norm>(cut, args, place)) return;
      finish<norm>(cut, of_group(args.eps, cut.index), place, source);
    };
    const auto share = [&](int64_t begin, int64_t end, ParallelFor team) {
      if constexpr (!is_boxed_float<P>)
        if (plain && !team && project_rows<norm>(args, begin, end, place, alone)) return;
      for (int64_t g = begin; g < end; ++g) alone(cut_of(args.groups, g, team));
    };
    for_shares(args.groups, 0, args.groups.groups, parallel_for, share);
  });
}

}  // namespace

void EMBATTLE_AT_LEVEL(project)(const ProjectArgs& args, ParallelFor parallel_for) {
  if (args.delta.dtype != Dtype::f32)
    run<Any, false>(args, parallel_for);
  else
    is_plain(args.box) ? run<float, true>(args, parallel_for)
                       : run<float, false>(args, parallel_for);
}

}  // namespace embattle
