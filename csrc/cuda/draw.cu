// random_start and gaussian_noise.
//
// Random numbers depend on a key and an element's place alone. The layout is defined in
// python/embattle/ops/reference/random.py.
#include "plan.h"

namespace embattle::cuda {
namespace {

// Elements kCount * chunk up to kCount * (chunk + 1) of a tensor with elements T, zero where they
// are not valid: standard normal ones where `normal`, or those that a start in the norm's ball is
// made of, uniform in [0, 1), standard normal, or signed standard exponential. In one function, as
// what all begin with is long.
template <class T, Norm kNorm, class A, int kCount>
__device__ __forceinline__ Pack<A, kCount> drawn(bool normal, const int64_t (&key)[2],
                                                 int64_t chunk, unsigned valid) {
  constexpr bool kWide = sizeof(T) == 8;
  using R = std::conditional_t<kWide, double, float>;
  constexpr int kPerBlock = kWide ? 2 : 4;
  constexpr R kUnit = kWide ? R(0x1p-53) : R(0x1p-24f);
  static_assert(kCount % kPerBlock == 0);
  Pack<A, kCount> out;
#pragma unroll
  for (int i = 0; i < kCount; i += kPerBlock) {
    const Words words = philox(uint64_t(key[0]), uint64_t(key[1]),
                               uint64_t(chunk * (kCount / kPerBlock) + i / kPerBlock), 0);
    R m[kPerBlock];  // the integers behind elements, exact
#pragma unroll
    for (int j = 0; j < kPerBlock; ++j) {
      if constexpr (kWide)
        m[j] = R(bits53(words.w[2 * j], words.w[2 * j + 1]));
      else
        m[j] = R(words.w[j] >> 8);
    }
    if constexpr (kNorm != Norm::l2) {
      if (!normal) {
#pragma unroll
        for (int j = 0; j < kPerBlock; ++j) {
          if constexpr (kNorm == Norm::linf) {
            out[i + j] = A(m[j] * kUnit);
          } else {
            const R size = -log((m[j] + 1) * kUnit);
            out[i + j] = A(words.w[kWide ? 2 * j + 1 : j] & 1 ? -size : size);
          }
        }
        continue;
      }
    }
#pragma unroll
    for (int j = 0; j < kPerBlock; j += 2) {  // Box-Muller
      const R radius = sqrt(R(-2) * log((m[j] + 1) * kUnit));
      R s, c;
      sin_cos_pi(2 * (m[j + 1] * kUnit), &s, &c);
      out[i + j] = A(radius * c);
      out[i + j + 1] = A(radius * s);
    }
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i)
    if (!(valid >> i & 1)) out[i] = 0;
  return out;
}

// The same, not inlined: for chunks that shared memory does not hold.
template <class T, Norm kNorm, class A, int kCount>
__device__ EMBATTLE_NOINLINE Pack<A, kCount> drawn_again(bool normal, int64_t key0, int64_t key1,
                                                         int64_t chunk, unsigned valid) {
  return drawn<T, kNorm, A, kCount>(normal, {key0, key1}, chunk, valid);
}

// A group's radius in the unit ball of dimension n: U^(1/n).
__device__ __forceinline__ double draw_radius(const int64_t (&key)[2], int64_t group, double n) {
  const double u = radius_uniform(uint64_t(key[0]), uint64_t(key[1]), uint64_t(group));
  return exp(log(u) / larger(n, 1.0));
}

template <class T, Norm kNorm, bool kFull>
__global__ void __launch_bounds__(kMostThreads<kFull>, 1)
    draw_kernel(const __grid_constant__ GroupParams p) {
  using G = Group<T, kFull>;
  using A = typename G::A;
  using Chunk = typename G::Chunk;
  int64_t key[2];
  for (int i = 0; i < 2; ++i) key[i] = p.key ? p.key[i] : p.key_value[i];
  each_group<T, kFull>(p, [&](G& group, int64_t index) {
    group.prefetch(p.x);
    // Draws are kept like inputs; those that do not fit are drawn again in each pass.
    double length = 0;
    group.each([&](int k, int64_t c, unsigned valid) {
      if (valid == 0) return;
      const bool keep = k < p.resident;
      if (!keep && !(p.start && kNorm != Norm::linf)) return;
      const auto z = drawn<T, kNorm, A, G::kElements>(!p.start, key, c, valid);
      if (keep) store_pack(group.draw_slot(k), z);
#pragma unroll
      for (int i = 0; i < G::kElements; ++i)
        length += kNorm == Norm::l1 ? double(magnitude(z[i])) : double(z[i]) * double(z[i]);
    });
    async_wait();
    const double eps = value_of(p.eps, index);
    A factor;
    if (!p.start) {
      factor = A(value_of(p.std, index));
    } else if constexpr (kNorm == Norm::linf) {
      factor = A(eps);
    } else {
      length = group.team().sum(length);
      if (kNorm == Norm::l2) length = sqrt(length);
      const double n = group.count_valid();
      factor = A(length > 0 && eps > 0 ? eps * draw_radius(key, index, n) / length : 0.0);
    }
    const bool centred = p.start && kNorm == Norm::linf;
    const auto source = [&](int k, int64_t c, unsigned valid, typename G::V& x) {
      group.fetch_values(k, c, valid, x);
      if (valid == 0) return;
      Chunk z = k < p.resident
                    ? load_pack<G::kElements>(group.draw_slot(k))
                    : drawn_again<T, kNorm, A, G::kElements>(!p.start, key[0], key[1], c, valid);
#pragma unroll
      for (int i = 0; i < G::kElements; ++i) {
        if (centred) z[i] = valid >> i & 1 ? 2 * z[i] - 1 : A(0);
        x.v[i] = fused(factor, z[i], x.v[i]);
      }
    };
    group.template project<kNorm>(source, eps);
  });
}

int run(const NoiseArgs& args, bool start, const Context& context) {
  if (args.groups.groups == 0) return cudaSuccess;
  Queue queue(context);
  if (args.key_on_host) {
    // Such numbers would be the same at every replay of a graph.
    cudaStreamCaptureStatus capturing = cudaStreamCaptureStatusNone;
    queue.note(cudaStreamIsCapturing(queue.stream(), &capturing));
    if (capturing != cudaStreamCaptureStatusNone) queue.note(cudaErrorStreamCaptureUnsupported);
  }
  GroupParams p = params_of(args);
  p.std = args.std;
  p.start = start;
  if (!args.key_on_host) p.key = args.key;
  for (int i = 0; args.key_on_host && i < 2; ++i) p.key_value[i] = args.key[i];
  const auto kernels = [](auto type, auto norm, auto full) {
    using T = decltype(type);
    return GroupKernel{draw_kernel<T, norm, full>, kMostThreads<full>,
                       sizeof(typename Group<T, full>::A)};
  };
  return group_call(queue, p, args.norm, !any(args.box), kernels).run(queue);
}

}  // namespace

int random_start(const NoiseArgs& args, const Context& context) { return run(args, true, context); }
int gaussian_noise(const NoiseArgs& args, const Context& context) {
  return run(args, false, context);
}

}  // namespace embattle::cuda
