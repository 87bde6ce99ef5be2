// What the kernels over groups have in common: how a team goes through its group, and how the group
// is projected on the ball and stored.
//
// A group is cut into chunks of kElements elements that start at multiples of kElements in the
// whole tensor, so that full chunks are aligned; a chunk at a group's edge is shared with the
// neighbour and partly valid. Thread `rank` of a team of `size` has chunks rank, rank + size, ...
// of its group.
//
// Every input is read from global memory once: at the start each thread copies its chunks to its
// own slots in shared memory, in the background, and all passes over the group read them there.
// Chunks beyond what fits are read again in each pass, from the second-level cache with luck.
// Threads never read each other's slots: no barrier is needed for them.
//
// Two profiles: plain (float arithmetic; one dtype for all inputs; no origin, no box), and full
// (double arithmetic, a gradient of any dtype, origin, box). Sums are double in both.
#pragma once

#include "number.cuh"
#include "team.cuh"

namespace embattle::cuda {

// One input.
struct Stream {
  const void* data = nullptr;  // null: absent
  Dtype type = Dtype::f32;
  bool aligned = false;    // full chunks can be read as vectors
  bool broadcast = false;  // one element for all
  int slot = -1;           // where in shared memory its chunks are kept, in bytes; -1: nowhere
};

struct GroupParams {
  Groups groups;
  Shape shape;
  int resident = 0;  // chunks of each thread that shared memory holds
  Stream x, grad, velocity, x0, lower, upper;
  int draws = -1;  // slot for random values
  void* out = nullptr;
  Dtype out_type = Dtype::f32;
  bool out_aligned = false;
  void* velocity_out = nullptr;
  PerGroup step, eps, std;
  double top = 1, decay = 0;
  bool apgd = false;
  bool start = false;                     // random_start, not gaussian_noise
  const unsigned char* chosen = nullptr;  // [groups]: which groups move; null: all
  double* scores = nullptr;               // [groups]: norms that max_groups chooses by
  int32_t* nonfinite = nullptr;
  const int64_t* key = nullptr;  // [2] on the device; or null:
  int64_t key_value[2] = {};
  TeamGlobal* team_global = nullptr;
  Sums* team_slots = nullptr;
};

constexpr double kInfinity = __builtin_huge_val();

// Of a block. The full profile needs more registers than 512 threads can have.
template <bool kFull>
constexpr int kMostThreads = kFull ? 256 : 512;

// How much an l2 or l1 ball is shrunk so that rounding in the sums cannot leave it.
template <class T>
constexpr double kInside = sizeof(T) == 8 ? 1 - 1e-15 : 1 - 1e-13;

template <class A>
using Bits = std::conditional_t<sizeof(A) == 4, unsigned, unsigned long long>;

// The steepest ascent direction of a group, as numbers that give each element's part.
template <class A>
struct Direction {
  bool moving = false;
  A scale = 1;  // power of two that brings the gradient into range
  A factor = 0;
  // l1: elements with larger bits move, and of those with these bits the thread's first `ties`.
  Bits<A> key = 0;
  int ties = 0;
};

enum class Fit : int { inside, scaled, shifted };

// The projection of a group, as numbers that give each element's image.
struct Projection {
  Fit fit = Fit::inside;
  double scale = 1;  // l2
  double base = 0;   // l1: max(|v| - base - shift, 0)
  double shift = 0;
  double eps = 0;
};

// A chunk's values: v, the perturbation to project, and in the full profile what surrounds it.
template <class A, int kElements, bool kFull>
struct Values {
  A v[kElements];
};
template <class A, int kElements>
struct Values<A, kElements, true> {
  A v[kElements];
  A x[kElements];   // as given; NaN where nothing was
  A x0[kElements];  // 0 where there is none
  A low[kElements], high[kElements];
};

template <class A>
__device__ __forceinline__ Bits<A> bits_of(A x) {
  if constexpr (sizeof(A) == 4)
    return __float_as_uint(x);
  else
    return Bits<A>(__double_as_longlong(x));
}

// A power of two that brings magnitudes up to `largest` to where A neither overflows nor loses
// bits.
template <class A>
__device__ __forceinline__ A range_scale(double largest) {
  if constexpr (sizeof(A) == 4)
    return largest < 0x1p-60 ? 0x1p100f : largest > 0x1p60 ? 0x1p-100f : 1.f;
  else
    return largest < 0x1p-400 ? 0x1p600 : largest > 0x1p400 ? 0x1p-600 : 1.0;
}

template <class T, bool kFull>
class Group {
 public:
  using A = std::conditional_t<kFull, double, float>;
  static constexpr int kElements = kFull && sizeof(T) == 2 ? 4 : 16 / int(sizeof(T));
  static constexpr unsigned kAllValid = (1u << kElements) - 1;
  using Chunk = A[kElements];
  using V = Values<A, kElements, kFull>;

  __device__ Group(const GroupParams& p, Team& team, unsigned char* shared, int64_t index)
      : p_(p), team_(team), slots_(shared + sizeof(TeamScratch)) {
    const Groups& g = p.groups;
    const int64_t row = g.offsets ? g.offsets[index] : index * g.rows_per_group;
    const int64_t rows = g.offsets ? g.offsets[index + 1] - row : g.rows_per_group;
    begin_ = row * g.dim;
    end_ = begin_ + rows * g.dim;
    row_ = row;
    first_ = begin_ / kElements;
    chunks_ = end_ > begin_ ? (end_ + kElements - 1) / kElements - first_ : 0;
  }

  // f(k, chunk, valid) for each of this thread's chunks: its number in the thread, its number in
  // the tensor, and which of its elements belong to the group and are not masked out.
  template <class F>
  __device__ __forceinline__ void each(F f) const {
    int k = 0;
#pragma unroll 1  // a chunk's own elements and the other warps hide the latency; registers stay few
    for (int64_t at = team_.rank; at < chunks_; at += team_.size, ++k)
      f(k, first_ + at, valid(first_ + at));
  }

  // Starts copying this thread's chunks of an input to shared memory.
  __device__ void prefetch(const Stream& s) const {
    if (s.slot < 0) return;
    each([&](int k, int64_t c, unsigned valid) {
      if (k >= p_.resident || valid == 0) return;
      const int size = bytes_of(s.type);
      unsigned char* to = slot(s, k);
      const auto* from = static_cast<const unsigned char*>(s.data) + c * kElements * size;
      if (valid == kAllValid && s.aligned) {
        if (size * kElements >= 16)
          for (int at = 0; at < size * kElements; at += 16) async_copy<16>(to + at, from + at);
        else if (size * kElements == 8)
          async_copy<8>(to, from);
        else
          async_copy<4>(to, from);
        return;
      }
      copy_some(to, from, size, valid);
    });
  }

  // A chunk of an input, zero where it is not valid. kTyped: its elements are T.
  template <bool kTyped>
  __device__ __forceinline__ void fetch(const Stream& s, int k, int64_t c, unsigned valid,
                                        Chunk& out) const {
    const int size = kTyped ? int(sizeof(T)) : bytes_of(s.type);
    const void* from = nullptr;
    if (valid == 0) {
    } else if (s.slot >= 0 && k < p_.resident) {
      from = slots_ + s.slot + (k * int(blockDim.x) + int(threadIdx.x)) * (kElements * size);
    } else if (valid == kAllValid && s.aligned) {
      from = static_cast<const unsigned char*>(s.data) + c * kElements * size;
    }
    if (from) {
      if constexpr (kTyped)
        load_pack<T>(from, out);
      else
        load_pack(from, s.type, out);
      return;
    }
    const Slow slow = load_some(s.data, kTyped ? dtype_of<T> : s.type, c, valid);
#pragma unroll
    for (int i = 0; i < kElements; ++i) out[i] = slow.at[i];
  }

  // A chunk of the gradient, which in the full profile may be of another type.
  __device__ __forceinline__ void fetch_gradient(int k, int64_t c, unsigned valid,
                                                 Chunk& out) const {
    fetch<!kFull>(p_.grad, k, c, valid, out);
  }

  // x - x0 and, in the full profile, what surrounds it.
  __device__ __forceinline__ void fetch_values(int k, int64_t c, unsigned valid, V& out) const {
    if constexpr (!kFull) {
      if (p_.x.data)
        fetch<true>(p_.x, k, c, valid, out.v);
      else
        for (int i = 0; i < kElements; ++i) out.v[i] = 0;
    } else {
      fetch_or(p_.x, k, c, valid, A(0), out.x);
      fetch_or(p_.x0, k, c, valid, A(0), out.x0);
      fetch_or(p_.lower, k, c, valid, -A(kInfinity), out.low);
      fetch_or(p_.upper, k, c, valid, A(kInfinity), out.high);
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        out.v[i] = p_.x.data ? out.x[i] - out.x0[i] : A(0);
        if (!p_.x.data) out.x[i] = A(kInfinity) - A(kInfinity);  // equal to nothing
        // Bounds hold in the result's dtype; elements that take no part are not bounded.
        if (valid >> i & 1) {
          out.low[i] = A(widen(Round<T>::nearest(out.low[i])));
          out.high[i] = A(widen(Round<T>::nearest(out.high[i])));
        } else {
          out.low[i] = -A(kInfinity);
          out.high[i] = A(kInfinity);
        }
      }
    }
  }

  // A chunk of an input less the origin.
  __device__ __forceinline__ void fetch_offset(int k, int64_t c, unsigned valid, const Stream& s,
                                               Chunk& out) const {
    fetch<true>(s, k, c, valid, out);
    if constexpr (kFull) {
      if (!p_.x0.data) return;
      Chunk x0;
      fetch<true>(p_.x0, k, c, valid, x0);
#pragma unroll
      for (int i = 0; i < kElements; ++i) out[i] -= x0[i];
    }
  }

  // ---- Directions
  // ----------------------------------------------------------------------------------

  // How a gradient's magnitudes go into a maximum: non-finite ones as infinity.
  __device__ __forceinline__ static double extent(A g) {
    return is_finite(g) ? double(magnitude(g)) : kInfinity;
  }

  // The direction of steepest ascent of what source(k, chunk, valid, values) gives. Sets `finite`
  // to whether all of it is finite; where not, nothing moves.
  template <Norm kNorm, class Source>
  __device__ Direction<A> direction(Source source, double step, bool* finite) {
    Direction<A> u;
    Sums s;
    [[maybe_unused]] int first = 0;  // of this thread's elements: the first of the largest
    each([&](int k, int64_t c, unsigned valid) {
      Chunk g;
      source(k, c, valid, g);
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        if constexpr (kNorm == Norm::l1)
          if (extent(g[i]) > s.m) first = k * kElements + i;
        s.m = larger(s.m, extent(g[i]));
        if constexpr (kNorm == Norm::l2) s.a += double(g[i]) * double(g[i]);
      }
    });
    [[maybe_unused]] const double own = s.m;
    s = team_.template agree<kNorm == Norm::l2 ? kSumA | kMax : kMax>(s);
    *finite = s.m < kInfinity;
    if (!*finite || s.m == 0) return u;
    u.moving = true;
    if constexpr (kNorm == Norm::linf) {
      u.factor = A(step);
    } else if constexpr (kNorm == Norm::l2) {
      u.scale = range_scale<A>(s.m);
      double length = sqrt(s.a) * double(u.scale);
      if (sizeof(A) == 8 && u.scale != 1) {  // the squares may have left the range
        double squares = 0;
        each([&](int k, int64_t c, unsigned valid) {
          Chunk g;
          source(k, c, valid, g);
          for (int i = 0; i < kElements; ++i)
            squares += double(g[i] * u.scale) * double(g[i] * u.scale);
        });
        length = sqrt(team_.sum(squares));
      }
      constexpr double kMost = sizeof(A) == 4 ? 3e38 : 1.7e308;
      u.factor = A(larger(smaller(step / length, kMost), -kMost));
    } else {
      // The first of all is the answer for one coordinate.
      u.key = bits_of(A(s.m));
      const int64_t last =
          int64_t(-team_.max(own == s.m ? -double(element_of(first)) : -kInfinity));
      u.ties = up_to(last);
      u.factor = A(step);
      if (p_.top != 1) choose_coordinates(source, step, u);
    }
    return u;
  }

  // v moved by an element's part of the direction. `place`: the element's number in the thread.
  template <Norm kNorm>
  __device__ __forceinline__ static A moved(const Direction<A>& u, A v, A g, int place) {
    if constexpr (kNorm == Norm::l2) {
      return fused(u.factor, g * u.scale, v);
    } else if constexpr (kNorm == Norm::linf) {
      return g > 0 ? v + u.factor : g < 0 ? v - u.factor : v;
    } else {
      const Bits<A> key = bits_of(magnitude(g));
      const bool moves = key > u.key || (key == u.key && place < u.ties);
      return !moves ? v : g > 0 ? v + u.factor : g < 0 ? v - u.factor : v;
    }
  }

  // ---- Projection
  // ----------------------------------------------------------------------------------

  // The projection of what source(k, chunk, valid, values) gives on the ball and the box.
  template <Norm kNorm, class Source>
  __device__ Projection project(Source source, double eps) {
    Projection result;
    result.eps = eps;
    if constexpr (kNorm == Norm::linf) {
      return result;
    } else {
      if (!(eps < kInfinity)) return result;
      [[maybe_unused]] const bool boxed = kFull && (p_.lower.data || p_.upper.data);
      const A unit = kNorm == Norm::l2 && sizeof(T) == 8 ? range_scale<A>(extent_of(source)) : A(1);
      const double radius = eps * double(unit),
                   bound = kNorm == Norm::l2 ? radius * radius : radius;
      // a: of what would be stored as it is; b: of the values themselves; m: the largest.
      Sums s;
      each([&](int k, int64_t c, unsigned valid) {
        V x;
        source(k, c, valid, x);
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          if (!(valid >> i & 1)) continue;
          const double v = double(x.v[i] * unit), r = double(kept(x, i)) * double(unit);
          if constexpr (kNorm == Norm::l2) {
            s.a += r * r;
            s.b += v * v;
          } else {
            s.a += magnitude(r);
            s.b += magnitude(v);
            s.m = larger(s.m, magnitude(v));
          }
        }
      });
      constexpr bool kSame = !kFull && sizeof(T) == 4;  // stored values are the values
      s = team_.template agree<(kSame ? 0 : kSumA) | kSumB | (kNorm == Norm::l1 ? kMax : 0)>(s);
      if (kSame) s.a = s.b;
      if (!(s.a > bound)) return result;
      if constexpr (kNorm == Norm::l2) {
        result.fit = Fit::scaled;
        double scale = radius / sqrt(s.b);
        if constexpr (kFull)
          if (boxed) scale = scale_in_box(source, radius, s.b, double(unit));
        result.scale = smaller(scale, 1.0) * kInside<T>;
      } else {
        result.fit = Fit::shifted;
        if constexpr (kFull) {
          if (boxed) {
            result.shift = shift_in_box(source, eps, s.m);
            return result;
          }
        }
        shift(source, eps * kInside<T>, s, result);
      }
      return result;
    }
  }

  // An element's image under the projection, before it is stored.
  template <Norm kNorm>
  __device__ __forceinline__ static A image(const Projection& p, const V& x, int i) {
    A v = x.v[i];
    if constexpr (kNorm == Norm::linf) {
      const A eps = A(p.eps);
      v = v > eps ? eps : v < -eps ? -eps : v;
    } else if constexpr (kNorm == Norm::l2) {
      if (p.fit == Fit::scaled) {
        if (sizeof(A) == 8 || p.scale > 0x1p-100)
          v = mul_toward_zero(v, toward_zero<A>(p.scale));
        else  // below float's range, the product perhaps not
          v = toward_zero<A>(double(v) * p.scale);
      }
    } else {
      if (p.fit == Fit::shifted) {
        const double rest = larger(double(magnitude(v)) - p.base - p.shift, 0.0);
        const A size = toward_zero<A>(rest);
        v = v < 0 ? -size : size;
      }
    }
    if constexpr (kFull) v = boxed(x, i, v);
    return v;
  }

  // The result as it is stored: the origin plus the image, rounded so that it stays in the ball.
  template <Norm kNorm>
  __device__ __forceinline__ static T stored(const Projection& p, const V& x, int i) {
    if constexpr (!kFull) {
      if constexpr (kNorm == Norm::linf) {
        const A bound = A(widen(toward_zero<T>(p.eps)));
        const T near = Round<T>::nearest(x.v[i]);
        return widen(near) > bound    ? Round<T>::nearest(bound)
               : widen(near) < -bound ? Round<T>::nearest(-bound)
                                      : near;
      }
      const A v = image<kNorm>(p, x, i);
      return p.fit == Fit::inside ? Round<T>::nearest(v) : toward_zero<T>(v);
    } else {
      const A v = image<kNorm>(p, x, i);
      const double most = kNorm == Norm::linf    ? p.eps
                          : p.fit == Fit::inside ? kInfinity
                                                 : magnitude(v);
      return settled(x, i, v, most);
    }
  }

  // Writes the group: stored values, and the origin (or zero) where masked out.
  template <Norm kNorm, class Source>
  __device__ void store(Source source, const Projection& projection) {
    each([&](int k, int64_t c, unsigned valid) {
      V x;
      source(k, c, valid, x);
      Pack<T, kElements> result;
#pragma unroll
      for (int i = 0; i < kElements; ++i) result.at[i] = stored<kNorm>(projection, x, i);
      write(p_.out, p_.out_aligned, c, valid, result, p_.x0);
    });
  }

  // Writes a chunk's valid elements, and `base` (or zero) to those that are masked out.
  template <class U>
  __device__ __forceinline__ void write(void* out, bool aligned, int64_t c, unsigned valid,
                                        const Pack<U, kElements>& values,
                                        const Stream& base) const {
    U* to = static_cast<U*>(out) + c * kElements;
    if (valid == kAllValid && aligned) {
      constexpr int kPiece = 16 / int(sizeof(U)) < kElements ? 16 / int(sizeof(U)) : kElements;
#pragma unroll
      for (int i = 0; i < kElements; i += kPiece) {
        Pack<U, kPiece> piece;
#pragma unroll
        for (int j = 0; j < kPiece; ++j) piece.at[j] = values.at[i + j];
        reinterpret_cast<Pack<U, kPiece>*>(to)[i / kPiece] = piece;
      }
      return;
    }
    const Pack<U, kElements> copy = values;
    write_some(to, copy, in_range(c), valid,
               kFull && base.data ? static_cast<const U*>(base.data) + c * kElements : nullptr);
  }

  // The number of valid elements.
  __device__ double count_valid() {
    if (!p_.groups.mask) return double(end_ - begin_);
    double n = 0;
    each([&](int, int64_t, unsigned valid) { n += __popc(valid); });
    return team_.sum(n);
  }

  __device__ unsigned char* draw_slot(int k) const {
    return slots_ + p_.draws +
           (int64_t(k) * blockDim.x + threadIdx.x) * int64_t(sizeof(A) * kElements);
  }

  __device__ bool leads() const { return team_.rank == 0; }

 private:
  __device__ __forceinline__ unsigned char* slot(const Stream& s, int k) const {
    return slots_ + s.slot +
           (k * int(blockDim.x) + int(threadIdx.x)) * (kElements * bytes_of(s.type));
  }

  // A thread's elements are numbered by its chunks, k * kElements + i. The number in the tensor of
  // one, and how many of them do not come behind element `last` of the tensor.
  __device__ __forceinline__ int64_t element_of(int place) const {
    return (first_ + team_.rank + int64_t(place / kElements) * team_.size) * kElements +
           place % kElements;
  }
  __device__ __forceinline__ int up_to(int64_t last) const {
    const int64_t chunk = last / kElements - first_ - team_.rank;
    if (chunk < 0) return 0;
    const int64_t k = chunk / team_.size;
    return int(k * kElements + (k * team_.size == chunk ? last % kElements + 1 : kElements));
  }

  // Which of a chunk's elements belong to the group.
  __device__ __forceinline__ unsigned in_range(int64_t c) const {
    const int64_t e = c * kElements;
    unsigned bits = kAllValid;
    if (e < begin_) bits &= kAllValid << int(begin_ - e);
    if (e + kElements > end_) bits &= kAllValid >> int(e + kElements - end_);
    return bits;
  }

  __device__ __forceinline__ unsigned valid(int64_t c) const {
    const unsigned bits = in_range(c);
    return p_.groups.mask
               ? unmasked(bits, p_.groups.mask + row_, p_.groups.dim, c * kElements - begin_,
                          end_ - begin_ < (int64_t(1) << 31) - 64)
               : bits;
  }

  // Rare or long things, not inlined.

  // `at`: the chunk's first element, counted from the group's; `mask`: of the group's first row.
  static __device__ EMBATTLE_NOINLINE unsigned unmasked(unsigned bits, const bool* mask,
                                                        int64_t dim, int64_t at, bool small) {
    int i = at < 0 ? int(-at) : 0;
    at += i;
    // 32-bit division is several times cheaper.
    const int64_t row = small ? unsigned(at) / unsigned(dim) : at / dim;
    int64_t column = at - row * dim;
    mask += row;
    while (i < kElements && bits >> i) {
      const int left = dim - column < kElements - i ? int(dim - column) : kElements - i;
      if (!*mask) bits &= ~(((1u << left) - 1) << i);
      i += left;
      ++mask;
      column = 0;
    }
    return bits;
  }

  struct Slow {
    A at[kElements];
  };
  static __device__ EMBATTLE_NOINLINE Slow load_some(const void* data, Dtype type, int64_t c,
                                                     unsigned valid) {
    Slow out;
#pragma unroll
    for (int i = 0; i < kElements; ++i)
      out.at[i] = valid >> i & 1 ? load_one<A>(data, type, c * kElements + i) : A(0);
    return out;
  }

  static __device__ EMBATTLE_NOINLINE void copy_some(unsigned char* to, const unsigned char* from,
                                                     int size, unsigned valid) {
    for (int i = 0; i < kElements; ++i) {
      const bool here = valid >> i & 1;
      if (size == 2)
        reinterpret_cast<uint16_t*>(to)[i] = here ? reinterpret_cast<const uint16_t*>(from)[i] : 0;
      else if (size == 4)
        reinterpret_cast<uint32_t*>(to)[i] = here ? reinterpret_cast<const uint32_t*>(from)[i] : 0;
      else
        reinterpret_cast<uint64_t*>(to)[i] = here ? reinterpret_cast<const uint64_t*>(from)[i] : 0;
    }
  }

  template <class U>
  static __device__ EMBATTLE_NOINLINE void write_some(U* to, const Pack<U, kElements>& values,
                                                      unsigned here, unsigned valid,
                                                      const U* base) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      if (!(here >> i & 1)) continue;
      to[i] = valid >> i & 1 ? values.at[i] : base ? base[i] : Round<U>::nearest(0.f);
    }
  }

  __device__ __forceinline__ void fetch_or(const Stream& s, int k, int64_t c, unsigned valid,
                                           A other, Chunk& out) const {
    if (s.data && !s.broadcast) return fetch<true>(s, k, c, valid, out);
    const A value = s.data ? load_one<A>(s.data, dtype_of<T>, 0) : other;
#pragma unroll
    for (int i = 0; i < kElements; ++i) out[i] = value;
  }

  __device__ __forceinline__ static A boxed(const V& x, int i, A v) {
    const A low = x.low[i] - x.x0[i], high = x.high[i] - x.x0[i];
    return v < low ? low : v > high ? high : v;
  }

  // How far an element can go in the direction that v points to.
  __device__ __forceinline__ static double room(const V& x, int i) {
    const A r = x.v[i] < 0 ? x.x0[i] - x.low[i] : x.high[i] - x.x0[i];
    return larger(double(r), 0.0);
  }

  // Rounds x0 + v to T, nearest to it, but not farther than `most` from x0, and inside the box.
  __device__ __forceinline__ static T settled(const V& x, int i, A v, double most) {
    T r = v == x.x[i] - x.x0[i] ? Round<T>::nearest(x.x[i]) : Round<T>::nearest(x.x0[i] + v);
    if (magnitude(double(widen(r)) - x.x0[i]) > most) r = step_toward(r, x.x0[i]);
    if (double(widen(r)) < x.low[i]) r = Round<T>::nearest(x.low[i]);
    if (double(widen(r)) > x.high[i]) r = Round<T>::nearest(x.high[i]);
    return r;
  }

  // How far from the origin an element is once it is stored without projection.
  __device__ __forceinline__ static A kept(const V& x, int i) {
    if constexpr (!kFull)
      return A(widen(Round<T>::nearest(x.v[i])));
    else
      return A(widen(settled(x, i, boxed(x, i, x.v[i]), kInfinity))) - x.x0[i];
  }

  template <class Source>
  __device__ double extent_of(Source source) {
    double m = 0;
    each([&](int k, int64_t c, unsigned valid) {
      V x;
      source(k, c, valid, x);
      for (int i = 0; i < kElements; ++i)
        if (valid >> i & 1) m = larger(m, double(magnitude(x.v[i])));
    });
    return team_.max(m);
  }

  // The scale s with sum min(s |v|, room)^2 = radius^2. In q = s^2 the sum is concave and piecewise
  // linear: Newton's iteration from below rises to the root and ends on its piece.
  template <class Source>
  __device__ double scale_in_box(Source source, double radius, double squares, double unit) {
    double q = radius * radius / squares;
    for (int round = 0; round < 1000; ++round) {
      Sums s;  // a: squares of the free elements; b: of the bounds of the others
      each([&](int k, int64_t c, unsigned valid) {
        V x;
        source(k, c, valid, x);
        for (int i = 0; i < kElements; ++i) {
          if (!(valid >> i & 1)) continue;
          const double v = x.v[i] * unit, r = room(x, i) * unit;
          if (q * v * v < r * r)
            s.a += v * v;
          else
            s.b += r * r;
        }
      });
      s = team_.template agree<kSumA | kSumB>(s);
      if (!(s.a > 0)) break;
      const double next = (radius * radius - s.b) / s.a;
      if (!(next > q * (1 + 1e-15))) break;
      q = next;
    }
    return sqrt(q);
  }

  // The threshold with sum max(|v| - shift, 0) = eps: Newton's iteration from below (Michelot, "A
  // finite algorithm for finding the projection of a point onto the canonical simplex", 1986). For
  // a small ball magnitudes are taken relative to the largest: the differences are then exact.
  template <class Source>
  __device__ void shift(Source source, double eps, const Sums& all, Projection& result) {
    const double n = count_valid();
    result.base = eps < all.m / 2 ? all.m : 0;
    double t = -eps;  // relative to the largest; the mean would be rounded
    if (result.base == 0) t = larger(larger(all.m - eps, (all.b - eps) / n), 0.0);
    for (int round = 0; round < 1000; ++round) {
      Sums s;
      each([&](int k, int64_t c, unsigned valid) {
        V x;
        source(k, c, valid, x);
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          if (!(valid >> i & 1)) continue;
          const double w = double(magnitude(x.v[i])) - result.base;
          if (w > t) {
            s.a += w;
            s.b += 1;
          }
        }
      });
      s = team_.template agree<kSumA | kSumB>(s);
      const double next = (s.a - eps) / s.b;
      if (!(next > t)) break;
      t = next;
    }
    result.shift = t;
  }

  // The threshold with sum min(max(|v| - shift, 0), room) = eps: Newton's iteration, kept inside a
  // shrinking bracket as the sum is neither convex nor concave.
  template <class Source>
  __device__ double shift_in_box(Source source, double eps, double largest) {
    double low = 0, high = largest, t = 0;
    for (int round = 0; round < 1000; ++round) {
      Sums s;  // a: the sum; b: how many elements are free
      each([&](int k, int64_t c, unsigned valid) {
        V x;
        source(k, c, valid, x);
        for (int i = 0; i < kElements; ++i) {
          if (!(valid >> i & 1)) continue;
          const double w = double(magnitude(x.v[i])) - t, r = room(x, i);
          if (w <= 0) continue;
          s.a += smaller(w, r);
          if (w < r) s.b += 1;
        }
      });
      s = team_.template agree<kSumA | kSumB>(s);
      if (s.a > eps) {
        low = t;
      } else {
        high = t;
        if (s.a >= eps * (1 - 3e-15)) break;
      }
      double next = s.b > 0 ? t + (s.a - eps * (1 - 1e-15)) / s.b : high;
      if (!(next > low && next < high)) next = low + (high - low) / 2;
      if (!(next > low && next < high)) break;
      t = next;
    }
    return high < largest || t == largest ? high : t;
  }

  // l1: which `top` coordinates of the gradient move, all by the same. On entry u.key has the bits
  // of the largest magnitude.
  template <class Source>
  __device__ void choose_coordinates(Source source, double step, Direction<A>& u) {
    // Chosen are the elements with larger bits than `key`, and those with these bits up to `last`.
    // Which they are is found by counting: first key, bit by bit from the top; then last, by
    // bisection.
    const Bits<A> largest = u.key;
    Bits<A> key = 0;
    int64_t low = begin_, high = end_ - 1;
    double n = 0, wanted = -1;
    for (int bit = int(sizeof(A)) * 8 - 2;;) {
      Bits<A> than = key;  // this round counts elements with larger bits, and these up to `last`
      int64_t last = -1;
      int ties = 0;
      if (wanted >= 0 && bit >= 0) {
        if ((key | Bits<A>(1) << bit) > largest) {
          --bit;
          continue;
        }
        than = (key | Bits<A>(1) << bit) - 1;
      } else if (wanted >= 0) {
        if (low == high) break;
        last = low + (high - low) / 2;
        ties = up_to(last);
      }
      Sums s;
      each([&](int k, int64_t c, unsigned valid) {
        Chunk g;
        source(k, c, valid, g);
        s.b += __popc(valid);
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          const Bits<A> bits = bits_of(magnitude(g[i]));
          s.a += valid >> i & 1 && (bits > than || (bits == than && k * kElements + i < ties));
        }
      });
      s = team_.template agree<kSumA | kSumB>(s);
      if (wanted < 0) {  // the first round counted what is not zero, and all
        n = s.b;
        wanted = p_.top < 1 ? larger(floor(n * p_.top + 0.5), 1.0) : floor(p_.top);
        wanted = smaller(wanted, s.a);
      } else if (bit >= 0) {
        if (s.a >= wanted) key |= Bits<A>(1) << bit;
        --bit;
      } else if (s.a >= wanted) {
        high = last;
      } else {
        low = last + 1;
      }
    }
    u.key = key;
    u.ties = up_to(low);
    u.factor = A(step / wanted);
  }

  const GroupParams& p_;
  Team& team_;
  unsigned char* slots_;
  int64_t row_, begin_, end_, first_, chunks_;
};

}  // namespace embattle::cuda
