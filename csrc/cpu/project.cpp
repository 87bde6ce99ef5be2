// project and project_: one read, one write.
#include "short_rows.h"

namespace embattle {
namespace {

template <class T>
struct Perturbation {
  Elements<T> x;
  const Place<T>& place;

  template <class N>
  V given(int64_t i, N n) const {
    return x.load(i, n);
  }
  template <class N>
  V z(int64_t i, N n) const {
    return given(i, n) - place.origin(i, n);
  }
};

template <class T>
void run(const ProjectArgs& args, ParallelFor parallel_for) {
  const Place<T> place(args.out, args.box);
  const Perturbation<T> source{Elements<T>(args.delta), place};
  const bool plain = place.plain && args.delta.dtype == args.out.dtype;
  with_norm(args.norm, [&](auto of) {
    constexpr Norm norm = decltype(of)::norm;
    const auto alone = [&](const Cut& cut) {
      if (plain && plain_project<norm, T>(cut, args)) return;
      finish<norm>(cut, of_group(args.eps, cut.index), place, source);
    };
    const auto share = [&](int64_t begin, int64_t end, ParallelFor team) {
      if (plain && !team && project_rows<norm, T>(args, begin, end, alone)) return;
      for (int64_t g = begin; g < end; ++g) alone(cut_of(args.groups, g, team));
    };
    for_shares(args.groups, 0, args.groups.groups, parallel_for, share);
  });
}

}  // namespace

void EMBATTLE_AT_LEVEL(project)(const ProjectArgs& args, ParallelFor parallel_for) {
  args.delta.dtype == Dtype::f32 ? run<float>(args, parallel_for) : run<Any>(args, parallel_for);
}

}  // namespace embattle
