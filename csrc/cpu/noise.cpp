// random_start, gaussian_noise and gaussian_noise_. Numbers are a function of the key and of an
// element's place in the tensor alone; the layout is told in python/embattle/ops/reference/.
#include <cmath>

#include "batch.h"
#include "draw.h"
#include "project_group.h"
#include "scratch.h"

namespace embattle {
namespace {

// Numbers of elements [begin, end) in double; begin is a multiple of 4. kWide: 53 bits of two words
// each, else 24 bits of one.
template <bool kWide, Draw kDraw>
inline void draw_in_double(const int64_t* key, int64_t begin, int64_t end, double* to) {
  constexpr int per_block = kWide ? 2 : 4;
  constexpr double ulp = kWide ? 0x1p-53 : 0x1p-24;
  for (int64_t i = begin; i < end; i += per_block) {
    const Words r = philox(static_cast<uint64_t>(key[0]), static_cast<uint64_t>(key[1]),
                           static_cast<uint64_t>(i / per_block), 0);
    double m[per_block];
    bool negative[per_block];
    for (int k = 0; k < per_block; ++k) {
      const uint32_t low = kWide ? r.w[2 * k + 1] : r.w[k];
      m[k] = static_cast<double>(kWide ? bits53(r.w[2 * k], low) : low >> 8);
      negative[k] = low & 1;
    }
    for (int k = 0; k < per_block; k += 2) {
      double* pair = to + (i - begin) + k;
      if (kDraw == Draw::uniform) {
        pair[0] = 2 * (m[k] * ulp) - 1;
        pair[1] = 2 * (m[k + 1] * ulp) - 1;
      } else if (kDraw == Draw::exponential) {
        for (int j = 0; j < 2; ++j) {
          const double size = -::log((m[k + j] + 1) * ulp);
          pair[j] = negative[k + j] ? -size : size;
        }
      } else {
        const double radius = ::sqrt(-2 * ::log((m[k] + 1) * ulp));
        const double angle = 6.283185307179586 * (m[k + 1] * ulp);
        pair[0] = radius * ::cos(angle);
        pair[1] = radius * ::sin(angle);
      }
    }
  }
}

// Calls f(i, n, numbers) for the vectors of elements that take part. Numbers of 24 bits come from
// float lanes, but for groups so small that their errors would not average out. T: what the kernel
// is compiled for; float64 is among Any.
template <class T, Draw kDraw, class F>
inline void for_numbers(const Cut& cut, const NoiseArgs& args, const Keys& keys, const F& f) {
  const bool wide = !std::is_same_v<T, float> && args.out.dtype == Dtype::f64;
  const bool in_floats = !wide && cut.end() - cut.begin() >= kFewest;
  cut.blocks([&](int, int64_t low, int64_t high) {
    cut.runs(low, high, [&](int64_t begin, int64_t end) {
      stretches(begin, end, [&](int64_t at, int64_t stop) {
        if (in_floats) {
          float numbers[kStretch];
          draw<kDraw>(keys, at, stop, numbers);
          each(at, stop, [&](int64_t i, auto n) { f(i, n, load(numbers + (i - at), n)); });
        } else {
          const int64_t start = at & ~int64_t{3};
          double numbers[kStretch + 4];
          if (wide)
            draw_in_double<true, kDraw>(args.key, start, stop, numbers);
          else
            draw_in_double<false, kDraw>(args.key, start, stop, numbers);
          each(at, stop, [&](int64_t i, auto n) { f(i, n, load(numbers + (i - start), n)); });
        }
      });
    });
  });
}

constexpr Draw start_of(Norm norm) {
  return norm == Norm::linf ? Draw::uniform : norm == Norm::l2 ? Draw::gaussian : Draw::exponential;
}

// The radius of a group, as a share of eps.
inline double radius_of(const Cut& cut, const int64_t* key) {
  const double u = radius_uniform(static_cast<uint64_t>(key[0]), static_cast<uint64_t>(key[1]),
                                  static_cast<uint64_t>(cut.index));
  const int64_t count = cut.count();
  return ::pow(u, 1 / static_cast<double>(count > 1 ? count : 1));
}

// ---- Float lanes, where there is neither an origin nor a box ----

// Groups of up to kBuffer elements are drawn into a buffer, which stays in cache, and written once;
// of short ones so many that they have kTogether elements.
constexpr int64_t kBuffer = int64_t{1} << 17, kTogether = 4 * kStretch;

// How many elements a share's buffer needs.
inline int64_t buffer_for(const Share& share, int64_t size) {
  int64_t extent = 0;
  for (int64_t g = share.begin; g < share.end; ++g) {
    const Cut cut = cut_of(share.groups, g, nullptr);
    const int64_t own = cut.end() - cut.begin();
    if (own > extent && own <= kBuffer) extent = own;
    if (!share.groups.offsets) break;
  }
  return extent * size;
}

// Calls f(i, n, numbers) for the float vectors of elements that take part, and settle() on the
// thread that did a block.
template <Draw kDraw, class Fn, class S>
inline void for_floats(const Cut& cut, const Keys& keys, const Fn& f, const S& settle) {
  cut.blocks([&](int, int64_t low, int64_t high) {
    cut.runs(low, high, [&](int64_t begin, int64_t end) {
      stretches(begin, end, [&](int64_t at, int64_t stop) { draw_each<kDraw>(keys, at, stop, f); });
    });
    settle();
  });
}

// Draws the group into a buffer (drawn: that was done), and returns the sum of squares (l1: of
// sizes).
template <Norm kNorm>
inline double fill(const Cut& cut, const Keys& keys, float* buffer, bool drawn) {
  double sum = 0;
  cut.runs(cut.begin(), cut.end(), [&](int64_t begin, int64_t end) {
    stretches(begin, end, [&](int64_t at, int64_t stop) {
      if (!drawn) draw<start_of(kNorm)>(keys, at, stop, buffer + at);
      Terms<1> terms;
      terms.add(at, stop, [=](int64_t i, auto n, F* to) EMBATTLE_INLINE {
        const F z = fetch(buffer + i, n);
        to[0] = kNorm == Norm::l2 ? z * z : abs(z);
      });
      sum += terms.result().v[0];
    });
  });
  return sum;
}

// Scales a group's numbers, whose sum of squares (l1: of sizes) is known, to a share of the radius
// that is drawn for it. `false`: nothing was written.
template <Norm kNorm, class T>
inline bool scale_to_radius(const Cut& cut, double eps, double share, double sum,
                            const float* numbers, const Sink<T>& out) {
  const double size = kNorm == Norm::l2 ? __builtin_sqrt(sum) : sum;
  const double most = float_aim<T>(cut, eps);
  const double radius = eps * share < most ? eps * share : most;
  if (!(size > 0) || !fits_float(radius / size)) return false;
  const F scale = all(static_cast<float>(radius / size));
  const double stored = float_sums<1, true>(
                            cut,
                            [=](int64_t i, auto n, F* acc) EMBATTLE_INLINE {
                              const F z = out.store(i, n, fetch(numbers + i, n) * scale);
                              acc[0] = kNorm == Norm::l2 ? z * z : abs(z);
                            },
                            [&] { out.settle(); })
                            .v[0];
  keep_inside<kNorm>(cut, eps, out.p, stored);
  return true;
}

// Precondition of `true`: the cut is one group, or many with the same numbers and no ball.
template <class T>
inline bool add_in_floats(const Cut& cut, const NoiseArgs& args, const Keys& keys,
                          const Sink<T>& past) {
  const double std = of_group(args.std, cut.index), eps = of_group(args.eps, cut.index);
  if (cut.end() - cut.begin() < kFewest || !fits_float(std)) return false;
  if (sizeof(T) < 4 && args.norm == Norm::l1 && eps < kInfinity) return false;  // add_in_double
  const T* x = static_cast<const T*>(args.x.data);
  const Sink<T> out = eps == kInfinity ? past : Sink<T>(past.p);
  const F factor = all(static_cast<float>(std));
  for_floats<Draw::gaussian>(
      cut, keys,
      [=](int64_t i, auto n, F number)
          EMBATTLE_INLINE { out.store(i, n, fused(factor, number, fetch(x + i, n))); },
      [&] { out.settle(); });
  if (eps < kInfinity) project_group(cut, args, {args.out.data, args.out.dtype}, eps);
  return true;
}

// ---- The start in float lanes ----

// How many groups are drawn together, by the table of batch.h but for l1 and l2.
inline int64_t start_size(const NoiseArgs& args) {
  const Groups& groups = args.groups;
  if (args.norm == Norm::linf) return batch_size(groups, args.norm, is_one_number(args.eps));
  return are_short(groups) ? kTogether / (groups.rows_per_group * groups.dim) : 1;
}

// The radii of groups [first, last) of n elements each, as radius_of gives them.
inline void radii_of(const int64_t* key, int64_t first, int64_t last, int64_t n, double* to) {
  const int64_t of_groups[] = {key[0], key[1] ^ INT64_MIN};  // stream 1
  const Keys keys(of_groups);
  const double power = 1 / static_cast<double>(n);
  for (int64_t g = first & ~int64_t{kLanes - 1}; g < last; g += kLanes) {
    U words[1][2];
    philox_sets<1>(keys, static_cast<uint64_t>(g), words);
    for (int k = 0; k < kLanes; ++k) {
      const int64_t group = g + static_cast<int64_t>(kOrder[k]);
      if (group < first || group >= last) continue;
      const uint64_t bits = bits53(words[0][0][2 * k], words[0][1][2 * k]);
      to[group - first] = ::pow(static_cast<double>(bits + 1) * 0x1p-53, power);
    }
  }
}

// As in plain.h: `false` means that nothing was written, and l1 and l2 hand over what they leave.
template <Norm kNorm, class T, class D>
inline bool start_in_floats(const Batch& batch, const NoiseArgs& args, const Keys& keys,
                            const Sink<T>& out, float* buffer, const D& in_double) {
  const Cut all_groups = batch.joined();
  if (kNorm == Norm::linf) {
    const double eps = of_group(args.eps, batch.first);
    if (!(eps > 0) || !fits_float(eps)) return false;
    const F most = all(static_cast<float>(eps)),
            limit = all(static_cast<float>(round_down<T>(eps)));
    for_floats<Draw::uniform>(
        all_groups, keys,
        [=](int64_t i, auto n, F u) EMBATTLE_INLINE { out.store(i, n, clamped(u * most, limit)); },
        [&] { out.settle(); });
    return true;
  }
  const int64_t begin = all_groups.begin(), end = all_groups.end();
  const int64_t extent = (end - begin) / batch.count;
  if (extent < kFewest || extent > kBuffer || batch.team) return false;
  const bool together = batch.count > 1;
  double radii[kTogether / kFewest];
  float* const numbers = buffer - begin;  // by an element's place in the tensor
  if (together) {
    radii_of(args.key, batch.first, batch.first + batch.count, extent, radii);
    stretches(begin, end, [&](int64_t at, int64_t stop) {
      draw<start_of(kNorm)>(keys, at, stop, numbers + at);
    });
  }
  for (int k = 0; k < batch.count; ++k) {
    const Cut cut = batch.cut(k);
    const double eps = of_group(args.eps, cut.index);
    if (!(eps > 0) || !fits_float(eps) ||
        !scale_to_radius<kNorm>(cut, eps, together ? radii[k] : radius_of(cut, args.key),
                                fill<kNorm>(cut, keys, numbers, together), numbers, out))
      in_double(cut);
  }
  return true;
}

// ---- Any place ----

template <Norm kNorm, class T>
void start_in_double(const Cut& cut, const NoiseArgs& args, const Keys& keys, double eps,
                     const Place<T>& place) {
  if (!(eps > 0)) return clear(cut, place);
  for_numbers<T, start_of(kNorm)>(
      cut, args, keys, [&](int64_t i, auto n, V number) { place.out.store(i, n, number); });
  double scale = eps;
  if (kNorm != Norm::linf) {
    const double size = length<kNorm>(cut, [&](int64_t i, auto n) { return place.out.load(i, n); });
    scale = size > 0 ? eps * radius_of(cut, args.key) / size : 0;
  }
  finish<kNorm>(cut, eps, place,
                Source{[&](int64_t i, auto n) { return place.origin(i, n); },
                       [&, scale](int64_t i, auto n) { return place.out.load(i, n) * scale; }});
}

template <class T>
void add_in_double(const Cut& cut, const NoiseArgs& args, const Keys& keys) {
  const Elements<T> x(args.x);
  const double std = of_group(args.std, cut.index), eps = of_group(args.eps, cut.index);
  // The threshold of l1 is a difference, which would show what a half type rounds.
  const bool apart =
      args.norm == Norm::l1 && bytes_of(args.out.dtype) == 2 && cut.begin() < cut.end();
  Scratch<double> values(apart ? cut.end() - cut.begin() : 0);
  const Data sum = apart ? Data{values.get() - cut.begin(), Dtype::f64} : args.out;
  const Elements<T> to(sum);
  for_numbers<T, Draw::gaussian>(cut, args, keys, [&](int64_t i, auto n, V number) {
    to.store(i, n, x.load(i, n) + std * number);
  });
  project_group(cut, args, {sum.data, sum.dtype}, eps);
}

template <class T>
void start(const NoiseArgs& args, ParallelFor parallel_for) {
  const Place<T> place(args.out, args.box);
  const Keys keys(args.key);
  const int64_t size = place.plain ? start_size(args) : 0;
  with_norm(args.norm, [&]<Norm kNorm>(Of<kNorm>) {
    const auto in_double = [&](const Cut& cut) {
      start_in_double<kNorm>(cut, args, keys, of_group(args.eps, cut.index), place);
    };
    for_shares(args.groups, parallel_for, [&](const Share& share) {
      Scratch<float> buffer(kNorm == Norm::linf ? 0 : buffer_for(share, size));
      const auto in_floats = [&](const Batch& batch, const auto& out) {
        return start_in_floats<kNorm>(batch, args, keys, out, buffer.get(), in_double);
      };
      take_share<T>(share, size, args.out, nullptr, in_floats, in_double);
    });
  });
}

template <class T>
void add_noise(const NoiseArgs& args, ParallelFor parallel_for) {
  const Place<T> place(args.out, args.box);
  const Keys keys(args.key);
  const Groups& groups = args.groups;
  // Without a ball many groups are as one; but short ones, each by itself, draw in double.
  const bool alike = is_one_number(args.std) && is_one_number(args.eps) && !groups.offsets &&
                     groups.rows_per_group * groups.dim >= kFewest &&
                     of_group(args.eps, 0) == kInfinity;
  const int64_t size = place.plain ? batch_size(groups, Norm::linf, alike) : 0;
  const auto in_double = [&](const Cut& cut) { add_in_double<T>(cut, args, keys); };
  const auto in_floats = [&](const Batch& batch, const auto& out) {
    return add_in_floats(batch.joined(), args, keys, out);
  };
  for_shares(groups, parallel_for, [&](const Share& share) {
    take_share<T>(share, size, args.out, args.x.data, in_floats, in_double);
  });
}

}  // namespace

void EMBATTLE_AT_LEVEL(random_start)(const NoiseArgs& args, ParallelFor parallel_for) {
  args.out.dtype == Dtype::f32 ? start<float>(args, parallel_for) : start<Any>(args, parallel_for);
}

void EMBATTLE_AT_LEVEL(gaussian_noise)(const NoiseArgs& args, ParallelFor parallel_for) {
  args.out.dtype == Dtype::f32 ? add_noise<float>(args, parallel_for)
                               : add_noise<Any>(args, parallel_for);
}

}  // namespace embattle
