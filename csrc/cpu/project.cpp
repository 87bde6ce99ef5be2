// project and project_: one read, one write.
#include "plain.h"

namespace embattle {
namespace {

template <class T>
void run(const ProjectArgs& args, ParallelFor parallel_for) {
  const Place<T> place(args.out, args.box);
  const Elements<T> x(args.x);
  const auto given = [=](int64_t i, auto n) { return x.load(i, n); };
  const Source source{given, [&](int64_t i, auto n) { return given(i, n) - place.origin(i, n); }};
  const Groups& groups = args.groups;
  const bool plain = place.plain && args.x.dtype == args.out.dtype;
  const int64_t size = plain ? batch_size(groups, args.norm, is_one_number(args.eps)) : 0;
  with_norm(args.norm, [&]<Norm kNorm>(Of<kNorm>) {
    const auto in_double = [&](const Cut& cut) {
      finish<kNorm>(cut, of_group(args.eps, cut.index), place, source);
    };
    const auto in_floats = [&](const Batch& batch, const auto& out) {
      return project_in_floats<kNorm>(batch, args, out, in_double);
    };
    for_shares(groups, parallel_for, [&](const Share& share) {
      take_share<T>(share, size, args.out, args.x.data, in_floats, in_double);
    });
  });
}

}  // namespace

void EMBATTLE_AT_LEVEL(project)(const ProjectArgs& args, ParallelFor parallel_for) {
  args.x.dtype == Dtype::f32 ? run<float>(args, parallel_for) : run<Any>(args, parallel_for);
}

}  // namespace embattle
