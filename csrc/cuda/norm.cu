// group_norm, and the choice of groups that max_groups makes by it.
#include "plan.h"

namespace embattle::cuda {
namespace {

template <class T, Norm kNorm>
__global__ void __launch_bounds__(kMostThreads<sizeof(T) == 8>, 1)
    norm_kernel(const __grid_constant__ GroupParams p) {
  using G = Group<T, sizeof(T) == 8>;
  using A = typename G::A;
  each_group<T, sizeof(T) == 8>(p, [&](G& group, int64_t index) {
    group.prefetch(p.x);
    async_wait();
    Sums s;  // a: the sum; b: NaN where an element is; m: the largest
    const auto add = [&](A unit) {
      s = Sums{};
      group.each([&](int k, int64_t c, unsigned valid) {
        const auto x = group.template fetch<true>(p.x, k, c, valid);
#pragma unroll
        for (int i = 0; i < G::kElements; ++i) {
          const double v = double(x[i] * unit);
          if constexpr (kNorm == Norm::l2) s.a += v * v;
          if constexpr (kNorm == Norm::l1) s.a += magnitude(v);
          if (x[i] != x[i]) s.b = double(x[i]);
          s.m = larger(s.m, double(magnitude(x[i])));
        }
      });
      s = group.team().agree(kSumA | kSumB | kMax, s);
      return s.a;
    };
    double norm = 0;
    if constexpr (kNorm == Norm::l2) {
      norm = length(sizeof(T) == 8, [&](double unit) { return add(A(unit)); });
    } else {
      norm = add(1);
      if (kNorm == Norm::linf) norm = s.m + s.b;
    }
    if (p.scores) {
      // Groups with nothing unmasked come last, before them those whose gradient is not finite.
      const double n = group.count_valid();
      if (group.leads())
        p.scores[index] = n == 0 ? -2 : s.m < kInfinity && !(s.b != s.b) ? norm : -1;
    } else if (group.leads()) {
      store_one(p.out.data, p.out.dtype, index, norm);
    }
  });
}

GroupCall norm_call(Queue& queue, const Groups& groups, const ConstData& x, Norm norm) {
  GroupParams p;
  p.groups = groups;
  p.x = {x};
  return group_call(queue, p, norm, true, [](auto type, auto n, auto full) {
    return GroupKernel{norm_kernel<decltype(type), n>, kMostThreads<full>};
  });
}

// A score as an integer that sorts like it: -2, -1, then the bits of what is not negative.
__device__ __forceinline__ unsigned long long rank_key(double score) {
  return (unsigned long long)(score < 0 ? (long long)score : __double_as_longlong(score)) + 2;
}

// One block chooses for one sample, [tokens] scores: the k largest, the first ones among equals.
__global__ void __launch_bounds__(256) choose_kernel(const double* scores, unsigned char* chosen,
                                                     int64_t tokens, int64_t k, int64_t samples) {
  EMBATTLE_DYNAMIC_SHARED(shared);
  const Shape shape{.lanes = int(blockDim.x)};
  Team team(shape, shared);
  for (int64_t sample = blockIdx.x; sample < samples; sample += gridDim.x) {
    const double* score = scores + sample * tokens;
    Choice<unsigned long long> choice;
    choice.largest = ~0ull >> 1;
    choice.high = tokens - 1;
    choice.wanted = double(k);
    const auto counts = [&](int64_t t) {
      const auto key = rank_key(score[t]);
      return key > choice.than || (choice.ties && key == choice.than && t <= choice.last());
    };
    for (bool more = 0 < k && k < tokens && choice.prepare(); more;) {
      double n = 0;
      for (int64_t t = threadIdx.x; t < tokens; t += blockDim.x) n += counts(t);
      more = choice.next(team.sum(n));
    }
    for (int64_t t = threadIdx.x; t < tokens; t += blockDim.x)
      chosen[sample * tokens + t] = k > 0 && (k >= tokens || counts(t));
  }
}

}  // namespace

int group_norm(const NormArgs& args, const Context& context) {
  Queue queue(context);
  GroupCall call = norm_call(queue, args.groups, args.x, args.norm);
  call.p.out = args.out;
  return call.run(queue);
}

cudaError_t run_chosen(Queue& queue, GroupCall& step, const StepArgs& args) {
  const Norm dual = args.norm == Norm::l1     ? Norm::linf
                    : args.norm == Norm::linf ? Norm::l1
                                              : Norm::l2;
  const int64_t groups = args.groups.groups, tokens = args.groups_per_sample;
  GroupCall norms = norm_call(queue, args.groups, args.grad, dual);
  unsigned char* chosen = nullptr;
  queue.allocate(Array{&norms.p.scores, groups}, Array{&chosen, groups}, norms.counters(),
                 norms.slots(), step.counters(), step.slots());
  norms.launch(queue);
  const int64_t samples = groups ? groups / tokens : 0;
  const Grid grid{std::min<int64_t>(samples, 1 << 20), tokens <= 128 ? 64 : 256,
                  sizeof(TeamScratch)};
  queue.launch(choose_kernel, grid, norms.p.scores, chosen, tokens, args.rule.max_groups, samples);
  step.p.chosen = chosen;
  step.launch(queue);
  return queue.error();
}

void forget_error() { (void)cudaGetLastError(); }
const char* error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // namespace embattle::cuda
