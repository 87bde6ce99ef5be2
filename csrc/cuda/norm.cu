// group_norm, and the choice of groups that max_groups makes by it.
#include "select.cuh"

namespace embattle::cuda {
namespace {

template <class T, Norm kNorm>
__global__ void __launch_bounds__(kMostThreads<sizeof(T) == 8>, 1)
    norm_kernel(const __grid_constant__ GroupParams p) {
  EMBATTLE_DYNAMIC_SHARED(shared);
  Team team(p.shape, reinterpret_cast<TeamScratch*>(shared), p.team_global, p.team_slots);
  using G = Group<T, sizeof(T) == 8>;
  using A = typename G::A;
  for (int64_t index = team.index; index < p.groups.groups; index += team.count()) {
    G group(p, team, shared, index);
    group.prefetch(p.x);
    async_wait();
    Sums s;  // a: the sum; b: NaN where an element is; m: the largest
    const auto add = [&](A scale) {
      s = Sums{};
      group.each([&](int k, int64_t c, unsigned valid) {
        typename G::Chunk x;
        group.template fetch<true>(p.x, k, c, valid, x);
#pragma unroll
        for (int i = 0; i < G::kElements; ++i) {
          const double v = double(x[i] * scale);
          if constexpr (kNorm == Norm::l2) s.a += v * v;
          if constexpr (kNorm == Norm::l1) s.a += magnitude(v);
          if (x[i] != x[i]) s.b = double(x[i]);
          s.m = larger(s.m, double(magnitude(x[i])));
        }
      });
      s = team.agree(kSumA | kSumB | kMax, s);
    };
    add(1);
    double norm = kNorm == Norm::linf ? s.m + s.b : kNorm == Norm::l1 ? s.a : sqrt(s.a);
    if constexpr (kNorm == Norm::l2 && sizeof(T) == 8) {
      const A scale = range_scale<A>(s.m);
      if (scale != 1 && s.m > 0 && s.m < kInfinity) {
        add(scale);
        norm = sqrt(s.a) / scale;
      }
    }
    if (p.scores) {
      // Groups with nothing unmasked come last, before them those whose gradient is not finite.
      const double n = group.count_valid();
      if (group.leads())
        p.scores[index] = n == 0 ? -2 : s.m < kInfinity && !(s.b != s.b) ? norm : -1;
    } else if (group.leads()) {
      if (p.out_type == Dtype::f64)
        static_cast<double*>(p.out)[index] = norm;
      else
        static_cast<float*>(p.out)[index] = float(norm);
    }
  }
}

int run(GroupParams& p, Norm norm, const Limits& limits, const Context& context, void* workspace,
        size_t* needed) {
  return with_type(p.x.type, [&](auto tag) -> int {
    using T = decltype(tag);
    constexpr int kElements = Group<T, sizeof(T) == 8>::kElements;
    p.x.aligned = aligned(p.x.data, 16);
    return with_norm(norm, [&](auto n) -> int {
      const auto kernel = norm_kernel<T, decltype(n)::value>;
      Plan plan;
      const cudaError_t error =
          plan_groups(kernel, &plan, p, limits, kElements, kMostThreads<sizeof(T) == 8>, {&p.x});
      if (error != cudaSuccess) return error;
      if (needed) {
        *needed = plan.workspace;
        return cudaSuccess;
      }
      if (plan.workspace && !workspace) {
        workspace = context.allocate(context.self, plan.workspace);
        if (!workspace) return cudaErrorMemoryAllocation;
      }
      return launch(kernel, p, plan, context, workspace);
    });
  });
}

// A score as an integer that sorts like it: -2, -1, then the bits of what is not negative.
__device__ __forceinline__ long long rank_key(double score) {
  return score < 0 ? (long long)score + 2 : __double_as_longlong(score) + 2;
}

// One block chooses for one sample, [tokens] scores: the k largest, the first ones among equals.
__global__ void __launch_bounds__(256) choose_kernel(const double* scores, unsigned char* chosen,
                                                     int64_t tokens, int64_t k, int64_t samples) {
  EMBATTLE_DYNAMIC_SHARED(shared);
  Shape shape;
  shape.lanes = int(blockDim.x);
  Team team(shape, reinterpret_cast<TeamScratch*>(shared), nullptr, nullptr);
  for (int64_t sample = blockIdx.x; sample < samples; sample += gridDim.x) {
    const double* score = scores + sample * tokens;
    const auto count = [&](auto holds) {
      double n = 0;
      for (int64_t t = threadIdx.x; t < tokens; t += blockDim.x) n += holds(rank_key(score[t]), t);
      return team.sum(n);
    };
    // The k-th largest key, bit by bit; then how far into those with that key the choice reaches.
    long long limit = 0;
    int64_t last = tokens;
    if (k < tokens) {
      for (int bit = 62; bit >= 0; --bit) {
        const long long candidate = limit | 1ll << bit;
        if (count([&](long long key, int64_t) { return key >= candidate; }) >= double(k))
          limit = candidate;
      }
      const double needed = double(k) - count([&](long long key, int64_t) { return key > limit; });
      int64_t low = 0, high = tokens - 1;
      while (low < high) {
        const int64_t middle = low + (high - low) / 2;
        if (count([&](long long key, int64_t t) { return key == limit && t <= middle; }) >= needed)
          high = middle;
        else
          low = middle + 1;
      }
      last = k == 0 ? -1 : low;
    }
    for (int64_t t = threadIdx.x; t < tokens; t += blockDim.x) {
      const long long key = rank_key(score[t]);
      chosen[sample * tokens + t] = k > 0 && (key > limit || (key == limit && t <= last));
    }
  }
}

GroupParams dual_norm(const StepArgs& args, Norm* dual) {
  *dual = args.norm == Norm::l1 ? Norm::linf : args.norm == Norm::linf ? Norm::l1 : Norm::l2;
  GroupParams p;
  p.groups = args.groups;
  p.x.data = args.grad.data;
  p.x.type = args.grad.dtype;
  return p;
}

size_t scores_bytes(const StepArgs& args) {
  return rounded(size_t(args.groups.groups) * sizeof(double)) + rounded(size_t(args.groups.groups));
}

}  // namespace

int group_norm(const NormArgs& args, const Context& context) {
  if (args.groups.groups == 0) return cudaSuccess;
  Limits limits;
  const cudaError_t error = Limits::of_current_device(&limits);
  if (error != cudaSuccess) return error;
  GroupParams p;
  p.groups = args.groups;
  p.x.data = args.x.data;
  p.x.type = args.x.dtype;
  p.out = args.out.data;
  p.out_type = args.out.dtype;
  return run(p, args.norm, limits, context, nullptr, nullptr);
}

cudaError_t select_workspace(const StepArgs& args, const Limits& limits, size_t* bytes) {
  Norm dual;
  GroupParams p = dual_norm(args, &dual);
  size_t teams = 0;
  const int error = run(p, dual, limits, Context{}, nullptr, &teams);
  *bytes = scores_bytes(args) + rounded(teams);
  return static_cast<cudaError_t>(error);
}

cudaError_t select_groups(const StepArgs& args, const Limits& limits, void* workspace,
                          unsigned char** chosen, const Context& context) {
  Norm dual;
  GroupParams p = dual_norm(args, &dual);
  auto* scores = static_cast<double*>(workspace);
  *chosen =
      static_cast<unsigned char*>(workspace) + rounded(size_t(args.groups.groups) * sizeof(double));
  p.scores = scores;
  const int failed = run(p, dual, limits, context,
                         static_cast<unsigned char*>(workspace) + scores_bytes(args), nullptr);
  if (failed) return static_cast<cudaError_t>(failed);
  const int64_t tokens = args.groups_per_sample, samples = args.groups.groups / tokens;
  return enqueue(choose_kernel, std::min<int64_t>(samples, 1 << 20), tokens <= 128 ? 64 : 256,
                 sizeof(TeamScratch), context, static_cast<const double*>(scores), *chosen, tokens,
                 args.rule.max_groups, samples);
}

void forget_error() { (void)cudaGetLastError(); }
const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace embattle::cuda
