// random_start and gaussian_noise.
#include "plan.h"
#include "random.cuh"

namespace embattle::cuda {
namespace {

// A chunk of random values, zero where it is not valid: `normal` ones, or those that a start in the
// norm's ball is made of.
template <class T, Norm kNorm, class A, int kCount>
__device__ __forceinline__ Pack<A, kCount> drawn(bool normal, const int64_t (&key)[2],
                                                 int64_t chunk, unsigned valid) {
  constexpr Draw kStart = kNorm == Norm::linf ? Draw::uniform
                          : kNorm == Norm::l2 ? Draw::gaussian
                                              : Draw::exponential;
  Pack<A, kCount> out;
  draw<T, kStart>(normal, key, chunk, out.at);
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (!(valid >> i & 1)) out.at[i] = 0;
  return out;
}

// The same, not inlined: for chunks that shared memory does not hold.
template <class T, Norm kNorm, class A, int kCount>
__device__ EMBATTLE_NOINLINE Pack<A, kCount> drawn_again(bool normal, int64_t key0, int64_t key1,
                                                         int64_t chunk, unsigned valid) {
  return drawn<T, kNorm, A, kCount>(normal, {key0, key1}, chunk, valid);
}

template <class T, Norm kNorm, bool kFull>
__global__ void __launch_bounds__(kMostThreads<kFull>, 1)
    draw_kernel(const __grid_constant__ GroupParams p) {
  EMBATTLE_DYNAMIC_SHARED(shared);
  Team team(p.shape, reinterpret_cast<TeamScratch*>(shared), p.team_global, p.team_slots);
  using G = Group<T, kFull>;
  using A = typename G::A;
  using Chunk = typename G::Chunk;
  int64_t key[2];
  for (int i = 0; i < 2; ++i) key[i] = p.key ? p.key[i] : p.key_value[i];
  for (int64_t index = team.index; index < p.groups.groups; index += team.count()) {
    G group(p, team, shared, index);
    group.prefetch(p.x);
    // Draws are kept like inputs; those that do not fit are drawn again in each pass.
    double length = 0;
    group.each([&](int k, int64_t c, unsigned valid) {
      if (valid == 0) return;
      const bool keep = k < p.resident;
      if (!keep && !(p.start && kNorm != Norm::linf)) return;
      const auto z = drawn<T, kNorm, A, G::kElements>(!p.start, key, c, valid);
      if (keep) G::write_whole(reinterpret_cast<A*>(group.draw_slot(k)), z);
#pragma unroll
      for (int i = 0; i < G::kElements; ++i) {
        length +=
            kNorm == Norm::l1 ? double(magnitude(z.at[i])) : double(z.at[i]) * double(z.at[i]);
      }
    });
    async_wait();
    const double eps = value_of(p.eps, index);
    A factor;
    if (!p.start) {
      factor = A(value_of(p.std, index));
    } else if constexpr (kNorm == Norm::linf) {
      factor = A(eps);
    } else {
      length = team.sum(length);
      if (kNorm == Norm::l2) length = sqrt(length);
      const double n = group.count_valid();
      factor = A(length > 0 && eps > 0 ? eps * draw_radius(key, index, n) / length : 0.0);
    }
    const bool centred = p.start && kNorm == Norm::linf;
    const auto source = [&](int k, int64_t c, unsigned valid, typename G::V& x) {
      group.fetch_values(k, c, valid, x);
      if (valid == 0) return;
      Chunk z;
      if (k < p.resident) {
        load_pack<A>(group.draw_slot(k), z);
      } else {
        const auto again =
            drawn_again<T, kNorm, A, G::kElements>(!p.start, key[0], key[1], c, valid);
#pragma unroll
        for (int i = 0; i < G::kElements; ++i) z[i] = again.at[i];
      }
#pragma unroll
      for (int i = 0; i < G::kElements; ++i) {
        if (centred) z[i] = valid >> i & 1 ? 2 * z[i] - 1 : A(0);
        x.v[i] = fused(factor, z[i], x.v[i]);
      }
    };
    group.template project<kNorm>(source, eps);
  }
}

int run(const NoiseArgs& args, bool start, const Context& context) {
  if (args.groups.groups == 0) return cudaSuccess;
  if (args.key_on_host) {
    // Such numbers would be the same at every replay of a graph.
    cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
    const cudaError_t error =
        cudaStreamIsCapturing(static_cast<cudaStream_t>(context.stream), &capturing);
    if (error != cudaSuccess) return error;
    if (capturing != cudaStreamCaptureStatusNone) return cudaErrorStreamCaptureUnsupported;
  }
  return with_profile(args.out.dtype, !any(args.box), [&](auto tag, auto full) {
    using T = decltype(tag);
    constexpr bool kFull = decltype(full)::value;
    using G = Group<T, kFull>;
    GroupParams p;
    set_ball(p, args.groups, args.out, args.eps, args.box, G::kElements);
    if (!start) p.x = stream_of(args.x, G::kElements);
    p.std = args.std;
    p.start = start;
    if (!args.key_on_host) p.key = args.key;
    for (int i = 0; args.key_on_host && i < 2; ++i) p.key_value[i] = args.key[i];
    return with_norm(args.norm, [&](auto norm) {
      return run_groups(draw_kernel<T, decltype(norm)::value, kFull>, p, G::kElements,
                        kMostThreads<kFull>, {&p.x}, sizeof(typename G::A), context);
    });
  });
}

}  // namespace

int random_start(const NoiseArgs& args, const Context& context) { return run(args, true, context); }
int gaussian_noise(const NoiseArgs& args, const Context& context) {
  return run(args, false, context);
}

}  // namespace embattle::cuda
