// What the kernels over groups have in common: how a team goes through its group, and how the group
// is projected on the ball and stored.
//
// A group is cut into chunks of kElements elements that start at multiples of kElements in the
// whole tensor, so that full chunks are aligned; a chunk at a group's edge is shared with the
// neighbour and partly valid. Thread `rank` of a team of `size` has chunks rank, rank + size, ...
// of its group.
//
// What is projected and what moves it are read from global memory once: at the start each thread
// copies its chunks to its own slots in shared memory, in the background, and all passes over the
// group read them there. Chunks beyond what fits, the origin and the bounds are read again in each
// pass, from the second-level cache with luck. Threads never read each other's slots: no barrier is
// needed for them.
//
// Two profiles: plain (float arithmetic; one dtype for all inputs; no origin, no box), and full
// (double arithmetic, a gradient of any dtype, origin, box). Sums are double in both.
#pragma once

#include "../formulas.h"
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
  bool boxed = false;
  double lower_value = 0, upper_value = 0;  // where there is no tensor; not rounded yet
  int draws = -1;                           // slot for random values
  void* out = nullptr;
  Dtype out_type = Dtype::f32;
  bool out_aligned = false;
  void* velocity_out = nullptr;  // of the velocity's type
  bool velocity_aligned = false;
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

// Threads that a multiprocessor is sure to have registers for. The full profile needs more of them
// than 512 can have. A block has half of that, or all (plan.h).
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
template <class T, class A, int kElements, bool kFull>
struct Values {
  A v[kElements];
};
template <class T, class A, int kElements>
struct Values<T, A, kElements, true> {
  A v[kElements];
  // As in memory: a half type then takes a quarter of the registers.
  Pack<T, kElements> given;   // NaN where nothing was
  Pack<T, kElements> origin;  // 0 where there is none
  Pack<T, kElements> lower, upper;

  __device__ __forceinline__ A x(int i) const { return A(widen(given.at[i])); }
  __device__ __forceinline__ A x0(int i) const { return A(widen(origin.at[i])); }
  __device__ __forceinline__ A low(int i) const { return A(widen(lower.at[i])); }
  __device__ __forceinline__ A high(int i) const { return A(widen(upper.at[i])); }
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
  static constexpr int kElements = 16 / int(sizeof(T));
  static constexpr unsigned kAllValid = (1u << kElements) - 1;
  using Chunk = A[kElements];
  using V = Values<T, A, kElements, kFull>;

  __device__ Group(const GroupParams& p, Team& team, unsigned char* shared, int64_t index)
      : p_(p), team_(team), slots_(shared + sizeof(TeamScratch)), index_(index) {
    const Groups& g = p.groups;
    begin_ = row(index) * g.dim;
    end_ = row(index + 1) * g.dim;
  }

  // f(k, chunk, valid) for each of this thread's chunks: its number in the thread, its number in
  // the tensor, and which of its elements belong to the group and are not masked out.
  template <class F>
  __device__ __forceinline__ void each(F f) const {
    int k = 0;
#pragma unroll 1  // a chunk's own elements and the other warps hide the latency; registers stay few
    for (int64_t c = first(); c * kElements < end_; c += team_.size, ++k) f(k, c, valid(c));
  }

  // Starts copying this thread's chunks of inputs to shared memory.
  template <class... Streams>
  __device__ __forceinline__ void prefetch(const Streams&... streams) const {
    if (p_.resident == 0) return;
    each([&](int k, int64_t c, unsigned valid) {
      if (k < p_.resident && valid != 0) (prefetch_chunk(streams, k, c, valid), ...);
    });
  }

  // A chunk of an input, zero where it is not valid. kTyped: its elements are T; with kOrNot they
  // may be others, and shared memory then does not hold it. kKept: shared memory may hold it.
  template <bool kTyped, bool kKept = true, bool kOrNot = false>
  __device__ __forceinline__ void fetch(const Stream& s, int k, int64_t c, unsigned valid,
                                        Chunk& out) const {
    const int size = kTyped ? int(sizeof(T)) : bytes_of(s.type);
    const void* from = nullptr;
    if (valid == 0 || (kOrNot && s.type != dtype_of<T>)) {
    } else if (kKept && s.slot >= 0 && k < p_.resident) {
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
    const Slow slow = load_some(s.data, kTyped && !kOrNot ? dtype_of<T> : s.type, c, valid);
#pragma unroll
    for (int i = 0; i < kElements; ++i) out[i] = slow.at[i];
  }

  // A chunk of the gradient, which in the full profile may be of another type.
  __device__ __forceinline__ void fetch_gradient(int k, int64_t c, unsigned valid,
                                                 Chunk& out) const {
    fetch<!kFull>(p_.grad, k, c, valid, out);
  }

  // A chunk of the velocity, which in the full profile may be of another type. That is rare, and
  // not worth registers: it is then read and written element by element.
  __device__ __forceinline__ void fetch_velocity(int k, int64_t c, unsigned valid,
                                                 Chunk& out) const {
    fetch<true, true, kFull>(p_.velocity, k, c, valid, out);
  }

  // Writes a chunk of the new velocity, and what masked-out elements have.
  __device__ __forceinline__ void write_velocity(int64_t c, unsigned valid,
                                                 const Chunk& values) const {
    if (valid == kAllValid && p_.velocity_aligned) {
      Pack<T, kElements> kept;
#pragma unroll
      for (int i = 0; i < kElements; ++i) kept.at[i] = Round<T>::nearest(values[i]);
      return write_whole(static_cast<T*>(p_.velocity_out) + c * kElements, kept);
    }
    Slow slow;
#pragma unroll
    for (int i = 0; i < kElements; ++i) slow.at[i] = values[i];
    store_some(p_.velocity_out, p_.velocity.type, c, in_range(c), valid, slow,
               static_cast<const T*>(p_.apgd ? p_.x0.data : nullptr));
  }

  // x - x0 and, in the full profile, what surrounds it.
  __device__ __forceinline__ void fetch_values(int k, int64_t c, unsigned valid, V& out) const {
    if constexpr (!kFull) {
      if (p_.x.data)
        fetch<true>(p_.x, k, c, valid, out.v);
      else
        for (int i = 0; i < kElements; ++i) out.v[i] = 0;
    } else {
      const T infinity = Round<T>::nearest(float(kInfinity));
      const T minus_infinity = Round<T>::nearest(float(-kInfinity));
      const T lower = Round<T>::nearest(p_.lower_value), upper = Round<T>::nearest(p_.upper_value);
      fetch_as_is<true>(p_.x, k, c, valid, Round<T>::nearest(float(kInfinity - kInfinity)),
                        out.given);
      fetch_as_is<false>(p_.x0, k, c, valid, Round<T>::nearest(0.f), out.origin);
      fetch_as_is<false>(p_.lower, k, c, valid, lower, out.lower);
      fetch_as_is<false>(p_.upper, k, c, valid, upper, out.upper);
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        out.v[i] = p_.x.data ? out.x(i) - out.x0(i) : A(0);
        if (!(valid >> i & 1)) {  // takes no part: not bounded
          out.lower.at[i] = minus_infinity;
          out.upper.at[i] = infinity;
        }
      }
    }
  }

  // Keeps what became of a chunk of x in place of the copy in shared memory, which later passes
  // then read. The plain profile's, where A is T; shared memory holds the chunk.
  __device__ __forceinline__ void keep_values(int k, const V& x) const {
    static_assert(!kFull && std::is_same_v<T, A>);
    Pack<T, kElements> kept;
#pragma unroll
    for (int i = 0; i < kElements; ++i) kept.at[i] = x.v[i];
    write_whole(reinterpret_cast<T*>(slot(p_.x, k)), kept);
  }

  // An element of x as it was given; called before anything moves v.
  __device__ __forceinline__ static A given(const V& x, int i) {
    if constexpr (kFull)
      return x.x(i);
    else
      return x.v[i];
  }
  // A value less the origin.
  __device__ __forceinline__ static A from_origin(const V& x, int i, A value) {
    if constexpr (kFull)
      return value - x.x0(i);
    else
      return value;
  }

  // ---- Directions
  // ----------------------------------------------------------------------------------

  // How a gradient's magnitudes go into a maximum: non-finite ones as infinity.
  __device__ __forceinline__ static A extent(A g) {
    return is_finite(g) ? magnitude(g) : A(kInfinity);
  }

  // The direction of steepest ascent of what source(k, chunk, valid, values) gives. Sets `finite`
  // to whether all of it is finite; where not, nothing moves.
  //
  // All passes over the group are rounds of one loop, so that `source` is compiled once.
  template <Norm kNorm, class Source>
  __device__ __forceinline__ Direction<A> direction(Source source, double step, bool* finite) {
    Direction<A> u;
    [[maybe_unused]] int top = 0;  // of this thread's elements: the first of the largest
    [[maybe_unused]] Choice choice;
#pragma unroll 1
    for (bool again = false;; again = true) {  // the first round measures; others are rare
      Sums s;
      A most = 0;
      each([&](int k, int64_t c, unsigned valid) {
        Chunk g;
        source(k, c, valid, g);
        if (kNorm == Norm::l1 && again) return count(choice, k, valid, g, s);
#pragma unroll
        for (int i = 0; i < kElements; ++i) {
          if constexpr (kNorm == Norm::l1)
            if (extent(g[i]) > most) top = k * kElements + i;
          most = larger(most, extent(g[i]));
          if constexpr (kNorm == Norm::l2) s.a += double(g[i] * u.scale) * double(g[i] * u.scale);
        }
      });
      if (kNorm == Norm::l1 && again) {
        if (!next(choice, team_.agree(kSumA | kSumB, s))) {
          u.key = choice.key;
          u.ties = up_to(choice.low);
          u.factor = A(step / choice.wanted);
          return u;
        }
        continue;
      }
      s.m = double(most);
      s = team_.agree(kNorm == Norm::l2 ? kSumA | kMax : kMax, s);
      if (!again) {
        *finite = s.m < kInfinity;
        if (!*finite || s.m == 0) return u;
        u.moving = true;
      }
      if constexpr (kNorm == Norm::linf) {
        u.factor = A(step);
        return u;
      } else if constexpr (kNorm == Norm::l2) {
        double length = sqrt(s.a);
        if (!again) {
          u.scale = range_scale<A>(s.m);
          if (sizeof(A) == 8 && u.scale != 1) continue;  // the squares may have left the range
          length *= double(u.scale);
        }
        constexpr double kMost = sizeof(A) == 4 ? 3e38 : 1.7e308;
        u.factor = A(larger(smaller(step / length, kMost), -kMost));
        return u;
      } else {
        // The first of all is the answer for one coordinate.
        u.key = bits_of(A(s.m));
        const int64_t last =
            int64_t(-team_.max(double(most) == s.m ? -double(element_of(top)) : -kInfinity));
        u.ties = up_to(last);
        u.factor = A(step);
        if (p_.top == 1) return u;
        choice.largest = u.key;
        choice.low = begin_;
        choice.high = end_ - 1;
      }
    }
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

  // Finds the projection of what source(k, chunk, valid, values) gives on the ball and the box;
  // where again(projection) is true, that of what source gives from then on; and ends with
  // finish(k, chunk, valid, values, projection) for each chunk.
  //
  // All passes over the group are rounds of one loop, so that `source`, which is long, is compiled
  // once.
  template <Norm kNorm, class Source, class Again, class Finish>
  __device__ __forceinline__ void project(Source source, double eps, Again again, Finish finish) {
    Projection result;
    Search search;
    begin<kNorm>(search, eps, result);
#pragma unroll 1
    for (;;) {
      if (search.pass == Pass::finish && again(result)) {
        begin<kNorm>(search, eps, result);
        continue;
      }
      Sums s;
      each([&](int k, int64_t c, unsigned valid) {
        V x;
        source(k, c, valid, x);
        if (kNorm == Norm::linf || search.pass == Pass::finish)
          finish(k, c, valid, x, result);
        else
          measure<kNorm>(search, result, valid, x, s);
      });
      if (kNorm == Norm::linf || search.pass == Pass::finish) return;
      next<kNorm>(search, s, result);
    }
  }

  // Projects the group, and stores it.
  template <Norm kNorm, class Source>
  __device__ __forceinline__ void project(Source source, double eps) {
    project<kNorm>(
        source, eps, [](const Projection&) { return false; },
        [&](int, int64_t c, unsigned valid, const V& x, const Projection& projection) {
          store<kNorm>(c, valid, x, projection);
        });
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

  // Writes a chunk: stored values, and the origin (or zero) where masked out.
  template <Norm kNorm>
  __device__ __forceinline__ void store(int64_t c, unsigned valid, const V& x,
                                        const Projection& projection) const {
    Pack<T, kElements> result;
#pragma unroll
    for (int i = 0; i < kElements; ++i) result.at[i] = stored<kNorm>(projection, x, i);
    write(p_.out, p_.out_aligned, c, valid, result, p_.x0.data);
  }

  // Writes a chunk that is aligned.
  template <class U>
  __device__ __forceinline__ static void write_whole(U* to, const Pack<U, kElements>& values) {
    constexpr int kPiece = 16 / int(sizeof(U)) < kElements ? 16 / int(sizeof(U)) : kElements;
#pragma unroll
    for (int i = 0; i < kElements; i += kPiece) {
      Pack<U, kPiece> piece;
#pragma unroll
      for (int j = 0; j < kPiece; ++j) piece.at[j] = values.at[i + j];
      reinterpret_cast<Pack<U, kPiece>*>(to)[i / kPiece] = piece;
    }
  }

  // Writes a chunk's valid elements, and `base` (or zero) to those that are masked out.
  template <class U>
  __device__ __forceinline__ void write(void* out, bool aligned, int64_t c, unsigned valid,
                                        const Pack<U, kElements>& values, const void* base) const {
    U* to = static_cast<U*>(out) + c * kElements;
    if (valid == kAllValid && aligned) return write_whole(to, values);
    const Pack<U, kElements> copy = values;
    write_some(to, copy, in_range(c), valid,
               kFull && base ? static_cast<const U*>(base) + c * kElements : nullptr);
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

  // The first row of a group.
  __device__ __forceinline__ int64_t row(int64_t group) const {
    const Groups& g = p_.groups;
    return g.offsets ? g.offsets[group] : group * g.rows_per_group;
  }

  // This thread's first chunk.
  __device__ __forceinline__ int64_t first() const { return begin_ / kElements + team_.rank; }

  // A thread's elements are numbered by its chunks, k * kElements + i. The number in the tensor of
  // one, and how many of them do not come behind element `last` of the tensor.
  __device__ __forceinline__ int64_t element_of(int place) const {
    return (first() + int64_t(place / kElements) * team_.size) * kElements + place % kElements;
  }
  __device__ __forceinline__ int up_to(int64_t last) const {
    const int64_t chunk = last / kElements - first();
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
               ? unmasked(bits, p_.groups.mask + row(index_), p_.groups.dim, c * kElements - begin_,
                          end_ - begin_ < (int64_t(1) << 31) - 64)
               : bits;
  }

  __device__ __forceinline__ void prefetch_chunk(const Stream& s, int k, int64_t c,
                                                 unsigned valid) const {
    if (s.slot < 0) return;
    const int size = kFull ? bytes_of(s.type) : int(sizeof(T));
    unsigned char* to = slot(s, k);
    const auto* from = static_cast<const unsigned char*>(s.data) + c * kElements * size;
    if (valid != kAllValid || !s.aligned) return copy_some(to, from, size, valid);
    if (size * kElements >= 16)
#pragma unroll 1  // one piece, or a few
      for (int at = 0; at < size * kElements; at += 16) async_copy<16>(to + at, from + at);
    else if (size * kElements == 8)
      async_copy<8>(to, from);
    else
      async_copy<4>(to, from);
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

  // Writes a chunk of an output that is not of T.
  static __device__ EMBATTLE_NOINLINE void store_some(void* data, Dtype type, int64_t c,
                                                      unsigned here, unsigned valid,
                                                      const Slow& values, const T* base) {
    for (int i = 0; i < kElements; ++i) {
      if (!(here >> i & 1)) continue;
      const int64_t at = c * kElements + i;
      store_one(data, type, at, valid >> i & 1 ? values.at[i] : base ? A(widen(base[at])) : A(0));
    }
  }

  // A chunk of an input of T as it is in memory, zero where it is not valid; all `other` where the
  // input is absent.
  template <bool kKept>
  __device__ __forceinline__ void fetch_as_is(const Stream& s, int k, int64_t c, unsigned valid,
                                              T other, Pack<T, kElements>& out) const {
    if (!s.data || s.broadcast) {
      if (s.data) other = *static_cast<const T*>(s.data);
#pragma unroll
      for (int i = 0; i < kElements; ++i) out.at[i] = other;
      return;
    }
    const void* from = nullptr;
    if (valid == 0) {
    } else if (kKept && s.slot >= 0 && k < p_.resident) {
      from = slots_ + s.slot + (k * int(blockDim.x) + int(threadIdx.x)) * 16;
    } else if (valid == kAllValid && s.aligned) {
      from = static_cast<const T*>(s.data) + c * kElements;
    }
    out = from ? *static_cast<const Pack<T, kElements>*>(from)
               : load_some_as_is(static_cast<const T*>(s.data) + c * kElements, valid);
  }

  static __device__ EMBATTLE_NOINLINE Pack<T, kElements> load_some_as_is(const T* from,
                                                                         unsigned valid) {
    Pack<T, kElements> out;
#pragma unroll
    for (int i = 0; i < kElements; ++i)
      out.at[i] = valid >> i & 1 ? from[i] : Round<T>::nearest(0.f);
    return out;
  }

  // v, put where x0 + v lies in the box.
  __device__ __forceinline__ static A boxed(const V& x, int i, A v) {
    return between(v, A(x.low(i) - x.x0(i)), A(x.high(i) - x.x0(i)));
  }

  // Rounds x0 + v to T, nearest to it, but not farther than `most` from x0, and inside the box.
  __device__ __forceinline__ static T settled(const V& x, int i, A v, double most) {
    const double x0 = x.x0(i);
    T r = v == x.x(i) - x0 ? x.given.at[i] : Round<T>::nearest(x0 + v);
    if (magnitude(double(widen(r)) - x0) > most) r = step_toward(r, x0);
    // At a bound the result is the bound: x0 and what leads there may add up to its neighbour.
    if (double(widen(r)) < x.low(i) || v == x.low(i) - x0) r = x.lower.at[i];
    if (double(widen(r)) > x.high(i) || v == x.high(i) - x0) r = x.upper.at[i];
    return r;
  }

  // How far from the origin an element is once it is stored without projection.
  __device__ __forceinline__ static A kept(const V& x, int i) {
    if constexpr (!kFull)
      return A(widen(Round<T>::nearest(x.v[i])));
    else
      return A(widen(settled(x, i, boxed(x, i, x.v[i]), kInfinity))) - x.x0(i);
  }

  // ---- The search for a projection
  // ---------------------------------------------------------------------

  // What a pass over the group is for.
  enum class Pass : int {
    extent,   // the largest magnitude
    measure,  // whether the values lie in the ball, and what the search starts with
    shift,    // l1: a step towards the threshold
    nearest,  // how far the box is from the origin
    box,      // a step towards the scale or the threshold, with a box
    finish,
  };

  struct Search {
    Pass pass = Pass::measure;
    int round = 0;
    A unit = 1;  // l2: power of two that brings the values into range
    double radius = 0;
    double at = 0;    // where the search is: l1: the threshold; l2 with a box: the scale
    Bracket bracket;  // with a box: what that lies between
  };

  __device__ bool has_box() const { return kFull && p_.boxed; }

  template <Norm kNorm>
  __device__ __forceinline__ void begin(Search& search, double eps, Projection& result) const {
    search = Search{};
    result = Projection{};
    result.eps = search.radius = eps;
    if (kNorm == Norm::linf || !(eps < kInfinity))
      search.pass = Pass::finish;
    else if (kNorm == Norm::l2 && sizeof(T) == 8)
      search.pass = Pass::extent;
  }

  // Adds a chunk to the sums that a pass forms.
  template <Norm kNorm>
  __device__ __forceinline__ static void measure(const Search& search, const Projection& result,
                                                 unsigned valid, const V& x, Sums& s) {
    if (kNorm == Norm::l2 && sizeof(T) == 8 && search.pass == Pass::extent) {
#pragma unroll
      for (int i = 0; i < kElements; ++i)
        if (valid >> i & 1) s.m = larger(s.m, double(magnitude(x.v[i])));
    } else if (search.pass == Pass::measure) {
      // a: of what would be stored as it is; b: of the values themselves; m: the largest.
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        if (!(valid >> i & 1)) continue;
        const A unit = kNorm == Norm::l2 && sizeof(T) == 8 ? search.unit : A(1);
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
    } else if (kNorm == Norm::l1 && search.pass == Pass::shift) {
      // a: how far the elements beyond the threshold reach; b: how many they are.
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        if (!(valid >> i & 1)) continue;
        const double w = double(magnitude(x.v[i])) - result.base;
        if (w > search.at) {
          s.a += w;
          s.b += 1;
        }
      }
    } else if constexpr (kFull) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        if (!(valid >> i & 1)) continue;
        const double v = x.v[i];
        double w = 0;  // how far the origin is from where the search would put the element
        if (search.pass == Pass::box) {
          if (kNorm == Norm::l2)
            w = v * (search.at * result.scale);
          else
            w = larger(magnitude(v) - result.base - search.at, 0.0);
          if (kNorm == Norm::l1 && v < 0) w = -w;
        }
        const double put = boxed(x, i, w);
        const bool free = search.pass == Pass::box && put == w && (kNorm == Norm::l2 || w != 0);
        if constexpr (kNorm == Norm::l2) {
          // Squares in units of eps; a: of the free elements; b: of the others.
          const double part = put / result.eps;
          if (free)
            s.a += part * part;
          else
            s.b += part * part;
        } else {
          // a: the sum; b: how many elements are free.
          s.a += magnitude(put);
          s.b += free;
        }
      }
    }
  }

  // Takes a thread's sums of a pass; says what the next pass is for.
  template <Norm kNorm>
  __device__ __forceinline__ void next(Search& search, Sums s, Projection& result) {
    if (kNorm == Norm::l2 && sizeof(T) == 8 && search.pass == Pass::extent) {
      search.unit = range_scale<A>(team_.max(s.m));
      search.radius = result.eps * double(search.unit);
      search.pass = Pass::measure;
    } else if (search.pass == Pass::measure) {
      constexpr bool kSame = !kFull && sizeof(T) == 4;  // stored values are the values
      s = team_.agree((kSame ? 0 : kSumA) | kSumB | (kNorm == Norm::l1 ? kMax : 0), s);
      if (kSame) s.a = s.b;
      const double radius = search.radius;
      search.pass = Pass::finish;
      if (!(s.a > (kNorm == Norm::l2 ? radius * radius : radius))) return;
      if constexpr (kNorm == Norm::l2) {
        result.fit = Fit::scaled;
        // What brings the values to the ball's surface; with a box in units of that.
        result.scale = radius / sqrt(s.b);
        if (has_box() && radius > 0) {
          search.bracket.outer = smaller(1 / result.scale, 0x1p1000);
          search.bracket.at = search.at = 1;
          search.pass = Pass::nearest;
          return;
        }
        result.scale = smaller(result.scale, 1.0) * kInside<T>;
      } else {
        result.fit = Fit::shifted;
        if (has_box()) {
          result.base = radius < s.m / 2 ? s.m : 0;
          result.shift = search.bracket.inner = s.m - result.base;
          search.bracket.outer = -result.base;
          search.bracket.at = search.at = result.base > 0 ? -radius : 0;
          search.pass = Pass::nearest;
          return;
        }
        begin_shift(search, s, result);
      }
    } else if (kNorm == Norm::l1 && search.pass == Pass::shift) {
      next_shift(search, team_.agree(kSumA | kSumB, s), result);
    } else if constexpr (kFull) {
      s = team_.agree(kSumA | kSumB, s);
      const double radius = search.radius;
      if (search.pass == Pass::nearest) {
        // Where ball and box do not meet, the box wins: nothing is left of the values.
        const bool apart = kNorm == Norm::l2 ? s.b > 1 : s.a > radius;
        search.pass = apart ? Pass::finish : Pass::box;
        if (kNorm == Norm::l2 && apart) result.scale = 0;
      } else if constexpr (kNorm == Norm::l2) {
        double answer = search.bracket.inner;
        next_in_box(search, s.a + s.b, 1, search.at * sqrt(larger(1 - 2e-15 - s.b, 0.0) / s.a),
                    answer);
        if (search.pass == Pass::finish)
          result.scale = smaller(answer * result.scale, 1.0) * kInside<T>;
      } else {
        next_in_box(search, s.a, radius, search.at + (s.a - radius * (1 - 1e-15)) / s.b,
                    result.shift);
      }
    }
  }

  // No search is longer: it ends where rounding ends it.
  static constexpr int kMostRounds = 1000;

  // With a box: a step of the search for the scale or the threshold at which the norm, which is
  // `now` where the search is, is `goal`. Newton's method, which aims a little inside, would go to
  // `newton`. The answer is inside, or next to nothing.
  __device__ __forceinline__ static void next_in_box(Search& search, double now, double goal,
                                                     double newton, double& answer) {
    const bool inside = now <= goal;
    if (inside) answer = search.at;
    const bool on =
        !(inside && now >= goal * (1 - 3e-15)) && look_on(search.bracket, inside, newton);
    search.at = search.bracket.at;
    if (!on) search.pass = Pass::finish;
  }

  // The threshold with sum max(|v| - shift, 0) = eps: Newton's iteration from below (Michelot, "A
  // finite algorithm for finding the projection of a point onto the canonical simplex", 1986). For
  // a small ball magnitudes are taken relative to the largest: the differences are then exact.
  __device__ __forceinline__ void begin_shift(Search& search, const Sums& all, Projection& result) {
    const double eps = search.radius = result.eps * kInside<T>, n = count_valid();
    result.base = eps < all.m / 2 ? all.m : 0;
    search.at = -eps;  // relative to the largest; the mean would be rounded
    if (result.base == 0) search.at = larger(larger(all.m - eps, (all.b - eps) / n), 0.0);
    search.pass = Pass::shift;
  }
  __device__ __forceinline__ static void next_shift(Search& search, const Sums& s,
                                                    Projection& result) {
    const double next = (s.a - search.radius) / s.b;
    if (next > search.at) {
      search.at = next;
      if (++search.round < kMostRounds) return;
    }
    result.shift = search.at;
    search.pass = Pass::finish;
  }

  // ---- The choice of coordinates
  // -----------------------------------------------------------------------

  // l1: which `top` coordinates of the gradient move. Chosen are the elements with larger bits than
  // `key`, and those with these bits up to `low`. Which they are is found by counting: first key,
  // bit by bit from the top; then the last element, by bisection.
  struct Choice {
    Bits<A> largest = 0;  // of all
    Bits<A> key = 0;
    Bits<A> than = 0;  // the next pass counts elements with larger bits, and of those with
    int ties = 0;      // these bits the thread's first `ties`
    int bit = int(sizeof(A)) * 8 - 2;
    int64_t low = 0, high = 0;  // elements of the tensor, the last one chosen between them
    double wanted = -1;         // how many; known after the first count, which is of what is not
                                // zero, and of all
  };

  __device__ __forceinline__ static void count(const Choice& choice, int k, unsigned valid,
                                               const Chunk& g, Sums& s) {
    s.b += __popc(valid);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const Bits<A> bits = bits_of(magnitude(g[i]));
      s.a += valid >> i & 1 &&
             (bits > choice.than || (bits == choice.than && k * kElements + i < choice.ties));
    }
  }

  // Takes a count; false: the choice is made.
  __device__ __forceinline__ bool next(Choice& choice, const Sums& s) const {
    const auto candidate = [&] { return choice.key | Bits<A>(1) << choice.bit; };
    if (choice.wanted < 0) {
      choice.wanted = smaller(double(top_count(p_.top, int64_t(s.b))), s.a);
    } else if (choice.bit >= 0) {
      if (s.a >= choice.wanted) choice.key = candidate();
      --choice.bit;
    } else if (s.a >= choice.wanted) {
      choice.high = last_counted(choice);
    } else {
      choice.low = last_counted(choice) + 1;
    }
    while (choice.bit >= 0 && candidate() > choice.largest) --choice.bit;
    choice.than = choice.key;
    choice.ties = 0;
    if (choice.bit >= 0) {
      choice.than = candidate() - 1;
      return true;
    }
    choice.ties = up_to(last_counted(choice));
    return choice.low != choice.high;
  }
  __device__ __forceinline__ static int64_t last_counted(const Choice& choice) {
    return choice.low + (choice.high - choice.low) / 2;
  }

  const GroupParams& p_;
  Team& team_;
  unsigned char* slots_;
  // Of the group; begin_ and end_ are elements of the tensor. All else is computed from these:
  // registers are short.
  int64_t index_, begin_, end_;
};

}  // namespace embattle::cuda
