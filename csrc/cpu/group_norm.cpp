// Norms of groups, in one read of the input.
#include <cmath>

#include "level.h"

namespace embattle {
namespace {

// Partial sums are float64: exact enough for any group length.
template <class T>
double row_total(const T* x, int64_t n, Norm norm, double total) {
  switch (norm) {
    case Norm::l1:
      for (int64_t i = 0; i < n; ++i) total += std::fabs(static_cast<double>(x[i]));
      return total;
    case Norm::l2:
      for (int64_t i = 0; i < n; ++i) total += static_cast<double>(x[i]) * x[i];
      return total;
    case Norm::linf:
      for (int64_t i = 0; i < n; ++i) {
        const double a = std::fabs(static_cast<double>(x[i]));
        if (!(a <= total)) total = a;  // a NaN stays
      }
      return total;
  }
  return total;
}

template <class T>
void run(const NormArgs& args, ParallelFor parallel_for) {
  struct Context {
    const NormArgs& args;
  } context{args};
  const Groups& g = args.groups;
  const int64_t grain = g.rows * g.dim < 32768 ? g.groups : 1;
  parallel_for(
      g.groups, grain,
      [](void* opaque, int64_t begin, int64_t end) {
        const NormArgs& args = static_cast<Context*>(opaque)->args;
        const Groups& g = args.groups;
        const T* x = static_cast<const T*>(args.x.data);
        for (int64_t group = begin; group < end; ++group) {
          const int64_t first = g.offsets ? g.offsets[group] : group * g.rows_per_group;
          const int64_t last = g.offsets ? g.offsets[group + 1] : first + g.rows_per_group;
          double total = 0;
          for (int64_t row = first; row < last; ++row)
            if (!g.mask || g.mask[row]) total = row_total(x + row * g.dim, g.dim, args.norm, total);
          static_cast<T*>(args.out.data)[group] =
              static_cast<T>(args.norm == Norm::l2 ? std::sqrt(total) : total);
        }
      },
      &context);
}

}  // namespace

void EMBATTLE_AT_LEVEL(group_norm)(const NormArgs& args, ParallelFor parallel_for) {
  args.x.dtype == Dtype::f64 ? run<double>(args, parallel_for) : run<float>(args, parallel_for);
}

}  // namespace embattle
