// What the kernels over groups have in common: how a team goes through its group.
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

#include "edges.cuh"
#include "params.h"

namespace embattle::cuda {

constexpr double kInfinity = __builtin_huge_val();

// Threads that a multiprocessor is sure to have registers for. The full profile needs more of them
// than 512 can have. A block has half of that, or all (plan.h).
template <bool kFull>
constexpr int kMostThreads = kFull ? 256 : 512;

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

template <class T, bool kFull>
class Chunks {
 public:
  using A = std::conditional_t<kFull, double, float>;
  static constexpr int kElements = 16 / int(sizeof(T));
  static constexpr unsigned kAllValid = (1u << kElements) - 1;
  using Chunk = A[kElements];
  using V = Values<T, A, kElements, kFull>;
  using Edge = Edges<T, A, kElements>;
  using Slow = typename Edge::Slow;

  __device__ Chunks(const GroupParams& p, Team& team, unsigned char* shared, int64_t index)
      : p_(p), team_(team), slots_(shared + sizeof(TeamScratch)), index_(index) {
    const Groups& g = p.groups;
    begin_ = row(index) * g.dim;
    end_ = row(index + 1) * g.dim;
  }

  // f(k, chunk, valid) for each of this thread's chunks: its number in the thread, its number in
  // the tensor, and which of its elements belong to the group and are not masked out; from chunk k
  // on.
  template <class F>
  __device__ __forceinline__ void each(F f, int k = 0) const {
    // In 32 bits: 2^32 chunks would be 64 GB of one group.
    const int64_t head = begin_ / kElements;
    const auto chunks = unsigned((end_ + kElements - 1) / kElements - head);
    // Those in the middle are the group's alone, and nothing is asked about their elements.
    const unsigned before = begin_ % kElements != 0, behind = end_ % kElements != 0;
    const unsigned whole =
        p_.groups.mask || chunks < before + behind ? 0 : chunks - before - behind;
#pragma unroll 1  // a chunk's own elements and the other warps hide the latency; registers stay few
    for (auto at = unsigned(team_.rank + k * team_.size); at < chunks;
         at += unsigned(team_.size), ++k)
      f(k, head + at, at - before < whole ? kAllValid : valid(head + at));
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
    const auto load = [&](const void* from) {
      if constexpr (kTyped)
        load_pack<T>(from, out);
      else
        load_pack(from, s.type, out);
    };
    if (valid == 0) {
      for (A& x : out) x = 0;
      return;
    }
    if (!kOrNot || s.type == dtype_of<T>) {
      if (kKept && s.slot >= 0 && k < p_.resident) return load(slot<kTyped>(s, k));
      if (valid == kAllValid && s.aligned)
        return load(static_cast<const unsigned char*>(s.data) + c * kElements * size<kTyped>(s));
    }
    const Slow slow = Edge::load_some(s.data, kTyped && !kOrNot ? dtype_of<T> : s.type, c, valid);
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
    Edge::store_some(p_.velocity_out, p_.velocity.type, c, in_range(c), valid, slow,
                     static_cast<const T*>(p_.rule.apgd ? p_.x0.data : nullptr));
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
    write_whole(reinterpret_cast<T*>(slot<true>(p_.x, k)), kept);
  }

  __device__ __forceinline__ void kept_values(int k, V& x) const {
    load_pack<T>(slot<true>(p_.x, k), x.v);
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
    Edge::write_some(to, copy, in_range(c), valid,
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

 protected:
  // Of an input's elements; kTyped: they are T.
  template <bool kTyped>
  __device__ __forceinline__ static int size(const Stream& s) {
    return kTyped ? int(sizeof(T)) : bytes_of(s.type);
  }
  template <bool kTyped>
  __device__ __forceinline__ unsigned char* slot(const Stream& s, int k) const {
    return slots_ + s.slot +
           (k * int(blockDim.x) + int(threadIdx.x)) * (kElements * size<kTyped>(s));
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

  // Which of a chunk's elements belong to the group; and which of these are not masked out.
  __device__ __forceinline__ unsigned in_range(int64_t c) const {
    return Edge::in_range(c, begin_, end_);
  }
  __device__ __forceinline__ unsigned valid(int64_t c) const {
    const bool* mask = p_.groups.mask;
    return Edge::valid(c, begin_, end_, mask ? mask + row(index_) : nullptr, p_.groups.dim);
  }

  __device__ __forceinline__ void prefetch_chunk(const Stream& s, int k, int64_t c,
                                                 unsigned valid) const {
    if (s.slot < 0) return;
    const int size = Chunks::size<!kFull>(s);
    unsigned char* to = slot<!kFull>(s, k);
    const auto* from = static_cast<const unsigned char*>(s.data) + c * kElements * size;
    if (valid != kAllValid || !s.aligned) return Edge::copy_some(to, from, size, valid);
    if (size * kElements >= 16)
#pragma unroll 1  // one piece, or a few
      for (int at = 0; at < size * kElements; at += 16) async_copy<16>(to + at, from + at);
    else if (size * kElements == 8)
      async_copy<8>(to, from);
    else
      async_copy<4>(to, from);
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
               : Edge::load_some_as_is(static_cast<const T*>(s.data) + c * kElements, valid);
  }

  const GroupParams& p_;
  Team& team_;
  unsigned char* slots_;
  // Of the group; begin_ and end_ are elements of the tensor. All else is computed from these:
  // registers are short.
  int64_t index_, begin_, end_;
};

}  // namespace embattle::cuda
