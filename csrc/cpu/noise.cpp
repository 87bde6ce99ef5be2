// random_start, gaussian_noise and gaussian_noise_. Numbers are a function of the key and of an
// element's place in the tensor alone; the layout is told in python/embattle/ops/reference/.
#include <cmath>

#include "draw.h"
#include "inside.h"
#include "project_group.h"
#include "scratch.h"
#include "short_rows.h"

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

// A multiple of what already lies in the output.
template <class T>
struct Scaled {
  const Place<T>& place;
  double scale;

  template <class N>
  V given(int64_t i, N n) const {
    return place.origin(i, n);
  }
  template <class N>
  V z(int64_t i, N n) const {
    return place.out.load(i, n) * scale;
  }
};

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

// What float lanes need for groups of up to kBuffer elements: they are drawn into a buffer, which
// stays in cache, and written once.
constexpr int64_t kBuffer = int64_t{1} << 17;
struct Buffer {
  Scratch<float> memory;

  Buffer(const Groups& groups, int64_t begin, int64_t end) : memory(most(groups, begin, end)) {}
  // Where the elements of a group lie, by their place in the tensor.
  float* at(const Cut& cut) { return memory.get() - cut.begin(); }

 private:
  static int64_t most(const Groups& groups, int64_t begin, int64_t end) {
    int64_t extent = 0;
    for (int64_t g = begin; g < end; ++g) {
      const Cut cut = cut_of(groups, g, nullptr);
      const int64_t own = cut.end() - cut.begin();
      if (own > extent && own <= kBuffer) extent = own;
    }
    return extent;
  }
};

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

// Draws the group into a buffer (kDrawn: that was done), and returns the sum of squares (l1: of
// sizes).
template <Norm kNorm, bool kDrawn = false>
inline double fill(const Cut& cut, const Keys& keys, float* buffer) {
  double sum = 0;
  cut.runs(cut.begin(), cut.end(), [&](int64_t begin, int64_t end) {
    stretches(begin, end, [&](int64_t at, int64_t stop) {
      if (!kDrawn) draw<start_of(kNorm)>(keys, at, stop, buffer + at);
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

// As in plain.h, `false` means that nothing was written.
template <Norm kNorm, class T>
inline bool start_in_floats(const Cut& cut, const NoiseArgs& args, const Keys& keys, double eps,
                            Buffer& buffer) {
  const int64_t extent = cut.end() - cut.begin();
  if (!fits_float(eps)) return false;
  const Sink<T> out(args.out, nullptr, cut.groups.rows, cut.groups.dim);
  if (kNorm == Norm::linf) {
    const F most = all(static_cast<float>(eps)),
            limit = all(static_cast<float>(round_down<T>(eps)));
    for_floats<Draw::uniform>(
        cut, keys,
        [=](int64_t i, auto n, F u) EMBATTLE_INLINE { out.store(i, n, clamped(u * most, limit)); },
        [&] { out.settle(); });
    return true;
  }
  if (extent < kFewest || extent > kBuffer || cut.parallel_for) return false;
  const double sum = fill<kNorm>(cut, keys, buffer.at(cut));
  return scale_to_radius<kNorm>(cut, eps, radius_of(cut, args.key), sum, buffer.at(cut), out);
}

template <class T>
inline bool add_in_floats(const Cut& cut, const NoiseArgs& args, const Keys& keys) {
  const double std = of_group(args.std, cut.index), eps = of_group(args.eps, cut.index);
  if (cut.end() - cut.begin() < kFewest || !fits_float(std)) return false;
  if (sizeof(T) < 4 && args.norm == Norm::l1 && eps < kInfinity) return false;  // add_in_double
  const T* x = static_cast<const T*>(args.x.data);
  const Sink<T> past(args.out, x, cut.groups.rows, cut.groups.dim);
  const Sink<T> out = eps == kInfinity ? past : Sink<T>(past.p);
  const F factor = all(static_cast<float>(std));
  for_floats<Draw::gaussian>(
      cut, keys,
      [=](int64_t i, auto n, F number)
          EMBATTLE_INLINE { out.store(i, n, fused(factor, number, fetch(x + i, n))); },
      [&] { out.settle(); });
  if (eps < kInfinity)
    project_group(cut, args.norm, {args.out.data, args.out.dtype}, args.out, eps, {});
  return true;
}

// ---- Many short groups: their numbers are drawn together ----

// Numbers of so many elements, and radii of so many groups, at a time.
constexpr int64_t kTogether = 4 * kStretch, kRadii = kTogether / kFewest;

// The radii of groups [first, last) of n elements each, as radius_of gives them. last - first <=
// kRadii.
inline void radii_of(const Keys& keys, int64_t first, int64_t last, int64_t n, double* to) {
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

// Starts groups [begin, end) if there is a way for short ones. `alone(cut)` takes one group.
template <Norm kNorm, class T, class A>
inline bool start_rows(const NoiseArgs& args, const Keys& keys, int64_t begin, int64_t end,
                       Buffer& buffer, const A& alone) {
  const Groups& groups = args.groups;
  const Sink<T> out(args.out, nullptr, groups.rows, groups.dim);
  if (kNorm == Norm::linf) {
    const double eps = is_one_number(args.eps) ? of_group(args.eps, 0) : 0;
    if (!(eps > 0) || !fits_float(eps) || mean_extent(groups) > kShort) return false;
    stretches_of_groups(groups, begin, end, [&](const Cut& cut, int64_t, int64_t) {
      start_in_floats<kNorm, T>(cut, args, keys, eps, buffer);
      clear_masked(cut, out.p);
    });
    return true;
  }
  if (!are_short(groups)) return false;
  const int64_t key[] = {args.key[0], args.key[1] ^ INT64_MIN};  // of stream 1
  const Keys of_groups(key);
  const int64_t extent = groups.rows_per_group * groups.dim, many = kTogether / extent;
  float numbers[kTogether];
  double radii[kRadii];
  for (int64_t g = begin; g < end; g += many) {
    const int64_t last = g + many < end ? g + many : end, low = g * extent;
    stretches(low, last * extent, [&](int64_t at, int64_t stop) {
      draw<start_of(kNorm)>(keys, at, stop, numbers + (at - low));
    });
    radii_of(of_groups, g, last, extent, radii);
    for (int64_t i = g; i < last; ++i) {
      const Cut cut = cut_of(groups, i, nullptr);
      const double eps = of_group(args.eps, i);
      float* const at = numbers - low;
      if (!(eps > 0) || !fits_float(eps) ||
          !scale_to_radius<kNorm>(cut, eps, radii[i - g], fill<kNorm, true>(cut, keys, at), at,
                                  out))
        alone(cut);
    }
  }
  return true;
}

// Adds noise to groups [begin, end) likewise, where there is no ball.
template <class T>
inline bool add_to_rows(const NoiseArgs& args, const Keys& keys, int64_t begin, int64_t end) {
  const Groups& groups = args.groups;
  const bool alike = is_one_number(args.std) && is_one_number(args.eps) && !groups.offsets;
  if (!alike || !(of_group(args.eps, 0) == kInfinity) || !fits_float(of_group(args.std, 0)) ||
      groups.rows_per_group * groups.dim < kFewest || mean_extent(groups) > kShort)
    return false;
  stretches_of_groups(groups, begin, end, [&](const Cut& cut, int64_t, int64_t) {
    add_in_floats<T>(cut, args, keys);
    clear_masked(cut, static_cast<T*>(args.out.data));
  });
  return true;
}

// ---- Any place ----

template <Norm kNorm, class T>
void start_in_double(const Cut& cut, const NoiseArgs& args, const Keys& keys, double eps,
                     const Place<T>& place) {
  for_numbers<T, start_of(kNorm)>(
      cut, args, keys, [&](int64_t i, auto n, V number) { place.out.store(i, n, number); });
  double scale = eps;
  if (kNorm != Norm::linf) {
    const double size = length<kNorm>(cut, [&](int64_t i, auto n) { return place.out.load(i, n); });
    scale = size > 0 ? eps * radius_of(cut, args.key) / size : 0;
  }
  finish<kNorm>(cut, eps, place, Scaled<T>{place, scale});
}

template <class T>
void add_in_double(const Cut& cut, const NoiseArgs& args, const Keys& keys) {
  const Elements<T> x(args.x);
  const double std = of_group(args.std, cut.index), eps = of_group(args.eps, cut.index);
  // The threshold of l1 is a difference, which would show what a half type rounds.
  const bool apart = args.norm == Norm::l1 && bytes_of(args.out.dtype) == 2;
  Scratch<double> values(apart ? cut.end() - cut.begin() : 0);
  const Data sum = apart ? Data{values.get() - cut.begin(), Dtype::f64} : args.out;
  const Elements<T> to(sum);
  for_numbers<T, Draw::gaussian>(cut, args, keys, [&](int64_t i, auto n, V number) {
    to.store(i, n, x.load(i, n) + std * number);
  });
  project_group(cut, args.norm, {sum.data, sum.dtype}, args.out, eps, args.box);
}

template <class T>
void start(const NoiseArgs& args, ParallelFor parallel_for) {
  const Place<T> place(args.out, args.box);
  const Keys keys(args.key);
  with_norm(args.norm, [&](auto of) {
    constexpr Norm norm = decltype(of)::norm;
    const auto share = [&](int64_t begin, int64_t end, ParallelFor team) {
      Buffer buffer(args.groups, place.plain ? begin : end, end);
      const auto alone = [&](const Cut& cut) {
        const double eps = of_group(args.eps, cut.index);
        if (!(eps > 0)) return clear(cut, place);
        const bool done = place.plain && with_short_type<T>(args.out.dtype, [&](auto* type) {
                            typedef std::remove_pointer_t<decltype(type)> Short;
                            if (!start_in_floats<norm, Short>(cut, args, keys, eps, buffer))
                              return false;
                            clear_masked(cut, static_cast<Short*>(args.out.data));
                            return true;
                          });
        if (!done) start_in_double<norm>(cut, args, keys, eps, place);
      };
      const bool done = place.plain && !team && with_short_type<T>(args.out.dtype, [&](auto* type) {
                          typedef std::remove_pointer_t<decltype(type)> Short;
                          return start_rows<norm, Short>(args, keys, begin, end, buffer, alone);
                        });
      if (!done)
        for (int64_t g = begin; g < end; ++g) alone(cut_of(args.groups, g, team));
    };
    for_shares(args.groups, 0, args.groups.groups, parallel_for, share);
  });
}

template <class T>
void add_noise(const NoiseArgs& args, ParallelFor parallel_for) {
  const Place<T> place(args.out, args.box);
  const Keys keys(args.key);
  const auto alone = [&](const Cut& cut) {
    const bool done = place.plain && with_short_type<T>(args.out.dtype, [&](auto* type) {
                        typedef std::remove_pointer_t<decltype(type)> Short;
                        if (!add_in_floats<Short>(cut, args, keys)) return false;
                        clear_masked(cut, static_cast<Short*>(args.out.data));
                        return true;
                      });
    if (!done) add_in_double<T>(cut, args, keys);
  };
  const auto share = [&](int64_t begin, int64_t end, ParallelFor team) {
    const bool done = place.plain && !team && with_short_type<T>(args.out.dtype, [&](auto* type) {
                        typedef std::remove_pointer_t<decltype(type)> Short;
                        return add_to_rows<Short>(args, keys, begin, end);
                      });
    if (!done)
      for (int64_t g = begin; g < end; ++g) alone(cut_of(args.groups, g, team));
  };
  for_shares(args.groups, 0, args.groups.groups, parallel_for, share);
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
