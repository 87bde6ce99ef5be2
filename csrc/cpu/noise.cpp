// random_start, gaussian_noise and gaussian_noise_. Numbers are a function of the key and of an
// element's place in the tensor alone; the layout is told in python/embattle/reference.py.
#include <cmath>

#include "ball.h"

namespace embattle {
namespace {

enum class Draw { uniform, gaussian, exponential };  // in (-1, 1), N(0, 1), signed

constexpr int64_t kChunk = 256;

// Numbers of elements [begin, end), of which there are at most kChunk; begin is a multiple of 4.
// kWide: 53 bits of two words each, else 24 bits of one.
template <bool kWide>
inline void draw(Draw kind, const int64_t* key, int64_t begin, int64_t end, double* to) {
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
      if (kind == Draw::uniform) {
        pair[0] = 2 * (m[k] * ulp) - 1;
        pair[1] = 2 * (m[k + 1] * ulp) - 1;
      } else if (kind == Draw::exponential) {
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

// Calls f(i, n, numbers) for the vectors of elements that take part.
template <bool kWide, class F>
inline void for_numbers(const Cut& cut, Draw kind, const int64_t* key, const F& f) {
  cut.blocks([&](int, int64_t low, int64_t high) {
    cut.runs(low, high, [&](int64_t begin, int64_t end) {
      double numbers[kChunk + 4];
      for (int64_t at = begin; at < end;) {
        const int64_t start = at & ~int64_t{3};
        const int64_t stop = start + kChunk < end ? start + kChunk : end;
        draw<kWide>(kind, key, start, stop, numbers);
        each(at, stop, [&](int64_t i, auto n) { f(i, n, load(numbers + (i - start), n)); });
        at = stop;
      }
    });
  });
}

// A multiple of what already lies in the output.
template <class P>
struct Scaled {
  const P& place;
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

// x as it lies in the output, less the origin.
template <class P>
struct Lying {
  const P& place;

  template <class N>
  V given(int64_t i, N n) const {
    return place.out.load(i, n);
  }
  template <class N>
  V z(int64_t i, N n) const {
    return given(i, n) - place.origin(i, n);
  }
};

template <class T, bool kWide>
void start(const NoiseArgs& args, ParallelFor parallel_for) {
  const Place<T, false> place(args.out, args.box);
  with_norm(args.norm, [&](auto of) {
    constexpr Norm norm = decltype(of)::norm;
    constexpr Draw kind = norm == Norm::linf ? Draw::uniform
                          : norm == Norm::l2 ? Draw::gaussian
                                             : Draw::exponential;
    for_groups(args.groups, 0, args.groups.groups, parallel_for, [&](const Cut& cut) {
      const double eps = of_group(args.eps, cut.index);
      double scale = eps;
      if (eps > 0) {
        for_numbers<kWide>(cut, kind, args.key,
                           [&](int64_t i, auto n, V number) { place.out.store(i, n, number); });
        if (norm != Norm::linf) {
          const double size =
              length<norm>(cut, [&](int64_t i, auto n) { return place.out.load(i, n); });
          const double u =
              radius_uniform(static_cast<uint64_t>(args.key[0]), static_cast<uint64_t>(args.key[1]),
                             static_cast<uint64_t>(cut.index));
          const int64_t count = cut.count();
          const double root = ::pow(u, 1 / static_cast<double>(count > 1 ? count : 1));
          scale = size > 0 ? eps * root / size : 0;
        }
        finish<norm>(cut, eps, place, Scaled<Place<T, false>>{place, scale});
      } else {
        clear(cut, place);
      }
    });
  });
}

template <class T, bool kWide>
void add_noise(const NoiseArgs& args, ParallelFor parallel_for) {
  const Place<T, false> place(args.out, args.box);
  const Elements<T> x(args.x);
  with_norm(args.norm, [&](auto of) {
    constexpr Norm norm = decltype(of)::norm;
    for_groups(args.groups, 0, args.groups.groups, parallel_for, [&](const Cut& cut) {
      const double std = of_group(args.std, cut.index);
      for_numbers<kWide>(cut, Draw::gaussian, args.key, [&](int64_t i, auto n, V number) {
        place.out.store(i, n, x.load(i, n) + std * number);
      });
      finish<norm>(cut, of_group(args.eps, cut.index), place, Lying<Place<T, false>>{place});
    });
  });
}

}  // namespace

void EMBATTLE_AT_LEVEL(random_start)(const NoiseArgs& args, ParallelFor parallel_for) {
  args.out.dtype == Dtype::f64   ? start<Any, true>(args, parallel_for)
  : args.out.dtype == Dtype::f32 ? start<float, false>(args, parallel_for)
                                 : start<Any, false>(args, parallel_for);
}

void EMBATTLE_AT_LEVEL(gaussian_noise)(const NoiseArgs& args, ParallelFor parallel_for) {
  args.out.dtype == Dtype::f64   ? add_noise<Any, true>(args, parallel_for)
  : args.out.dtype == Dtype::f32 ? add_noise<float, false>(args, parallel_for)
                                 : add_noise<Any, false>(args, parallel_for);
}

}  // namespace embattle
