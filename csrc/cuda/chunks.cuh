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
#include "team.cuh"

namespace embattle::cuda {

// One input.
struct Stream : ConstData {
  bool broadcast = false;  // one element for all
  bool aligned = false;    // full chunks can be read as vectors
  int slot = -1;           // where in shared memory its chunks are kept, in bytes; -1: nowhere
};

struct GroupParams {
  Groups groups;
  Shape shape;
  int resident = 0;  // chunks of each thread that shared memory holds
  Stream x, grad, velocity, x0, lower, upper;
  bool boxed = false;
  double lower_value = 0, upper_value = 0;             // where there is no tensor; not rounded yet
  int draws = -1;                                      // slot for random values
  Data out, velocity_out;                              // of the types of x and of the velocity
  bool out_aligned = false, velocity_aligned = false;  // and x and the velocity are of one type
  PerGroup step, eps, std;
  StepRule rule;
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

// A chunk's values: v, the perturbation to project, and in the full profile what surrounds it.
template <class T, class A, int kElements, bool kFull>
struct Values {
  Pack<A, kElements> v;

  // An element as it was given, before anything moves v; and its origin.
  __device__ __forceinline__ A x(int i) const { return v[i]; }
  __device__ __forceinline__ A x0(int) const { return 0; }
};
template <class T, class A, int kElements>
struct Values<T, A, kElements, true> {
  Pack<A, kElements> v;
  // As in memory: a half type then takes a quarter of the registers.
  Pack<T, kElements> given;   // NaN where nothing was
  Pack<T, kElements> origin;  // 0 where there is none
  Pack<T, kElements> lower, upper;

  __device__ __forceinline__ A x(int i) const { return A(widen(given[i])); }
  __device__ __forceinline__ A x0(int i) const { return A(widen(origin[i])); }
  __device__ __forceinline__ A low(int i) const { return A(widen(lower[i])); }
  __device__ __forceinline__ A high(int i) const { return A(widen(upper[i])); }
};

template <class T, bool kFull>
class Chunks {
 public:
  using A = std::conditional_t<kFull, double, float>;
  static constexpr int kElements = 16 / int(sizeof(T));
  static constexpr unsigned kAllValid = (1u << kElements) - 1;
  using Chunk = Pack<A, kElements>;
  using Raw = Pack<T, kElements>;  // as in memory
  using V = Values<T, A, kElements, kFull>;
  using Edge = Edges<T, A, kElements>;

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
    const int64_t head = chunk_of(begin_);
    const auto chunks = unsigned(chunk_of(end_ + kElements - 1) - head);
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
  // may be others, and shared memory then does not hold it.
  template <bool kTyped, bool kOrNot = false>
  __device__ __forceinline__ Chunk fetch(const Stream& s, int k, int64_t c, unsigned valid) const {
    const auto load = [&](const unsigned char* from) {
      if constexpr (kTyped)
        return widened<A>(load_pack<kElements>(reinterpret_cast<const T*>(from)));
      else
        return load_pack<A, kElements>(from, s.dtype);
    };
    if (valid == 0) return {};
    if (!kOrNot || s.dtype == dtype_of<T>) {
      if (s.slot >= 0 && k < p_.resident) return load(slot<kTyped>(s, k));
      if (valid == kAllValid && s.aligned)
        return load(static_cast<const unsigned char*>(s.data) + c * kElements * size<kTyped>(s));
    }
    return Edge::load_any(s.data, kTyped && !kOrNot ? dtype_of<T> : s.dtype, c, valid);
  }

  // A chunk of the gradient, which in the full profile may be of another type.
  __device__ __forceinline__ Chunk fetch_gradient(int k, int64_t c, unsigned valid) const {
    return fetch<!kFull>(p_.grad, k, c, valid);
  }

  // A chunk of the velocity, which in the full profile may be of another type. That is rare, and
  // not worth registers: it is then read and written element by element.
  __device__ __forceinline__ Chunk fetch_velocity(int k, int64_t c, unsigned valid) const {
    return fetch<true, kFull>(p_.velocity, k, c, valid);
  }

  // Writes a chunk of the new velocity, and what masked-out elements have.
  __device__ __forceinline__ void write_velocity(int64_t c, unsigned valid,
                                                 const Chunk& values) const {
    T* const to = static_cast<T*>(p_.velocity_out.data) + c * kElements;
    if (valid == kAllValid && p_.velocity_aligned) return store_pack(to, narrowed<T>(values));
    const Chunk copy = values;
    Edge::write_any(p_.velocity_out.data, p_.velocity.dtype, c, in_range(c), valid, copy,
                    static_cast<const T*>(p_.rule.apgd ? p_.x0.data : nullptr));
  }

  // x - x0 and, in the full profile, what surrounds it.
  __device__ __forceinline__ void fetch_values(int k, int64_t c, unsigned valid, V& out) const {
    if constexpr (!kFull) {
      out.v = p_.x.data ? fetch<true>(p_.x, k, c, valid) : Chunk{};
    } else {
      const T infinity = nearest<T>(float(kInfinity));
      const T minus_infinity = nearest<T>(float(-kInfinity));
      const T lower = nearest<T>(p_.lower_value), upper = nearest<T>(p_.upper_value);
      out.given = fetch_as_is<true>(p_.x, k, c, valid, nearest<T>(float(kInfinity - kInfinity)));
      out.origin = fetch_as_is<false>(p_.x0, k, c, valid, nearest<T>(0.f));
      out.lower = fetch_as_is<false>(p_.lower, k, c, valid, lower);
      out.upper = fetch_as_is<false>(p_.upper, k, c, valid, upper);
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        out.v[i] = p_.x.data ? out.x(i) - out.x0(i) : A(0);
        if (!(valid >> i & 1)) {  // takes no part: not bounded
          out.lower[i] = minus_infinity;
          out.upper[i] = infinity;
        }
      }
    }
  }

  // Keeps what became of a chunk of x in place of the copy in shared memory, which later passes
  // then read. The plain profile's, where A is T; shared memory holds the chunk.
  __device__ __forceinline__ void keep_values(int k, const V& x) const {
    static_assert(!kFull && std::is_same_v<T, A>);
    store_pack(reinterpret_cast<T*>(slot<true>(p_.x, k)), x.v);
  }

  __device__ __forceinline__ Chunk kept_values(int k) const {
    return widened<A>(load_pack<kElements>(reinterpret_cast<const T*>(slot<true>(p_.x, k))));
  }

  // Writes a chunk's valid elements, and `base` (or zero) to those that are masked out.
  __device__ __forceinline__ void write(const Data& out, bool aligned, int64_t c, unsigned valid,
                                        const Raw& values, const void* base) const {
    T* to = static_cast<T*>(out.data) + c * kElements;
    if (valid == kAllValid && aligned) return store_pack(to, values);
    const Raw copy = values;
    Edge::write_some(to, copy, in_range(c), valid,
                     kFull && base ? static_cast<const T*>(base) + c * kElements : nullptr);
  }

  // The number of valid elements.
  __device__ double count_valid() {
    if (!p_.groups.mask) return double(end_ - begin_);
    double n = 0;
    each([&](int, int64_t, unsigned valid) { n += __popc(valid); });
    return team_.sum(n);
  }

  __device__ A* draw_slot(int k) const {
    return reinterpret_cast<A*>(slots_ + p_.draws) +
           (int64_t(k) * blockDim.x + threadIdx.x) * kElements;
  }

  __device__ bool leads() const { return team_.rank == 0; }
  __device__ Team& team() const { return team_; }

 protected:
  // Where an element is. Unsigned, the division is a shift and no more.
  __device__ __forceinline__ static int64_t chunk_of(int64_t element) {
    return int64_t(uint64_t(element) / kElements);
  }

  // Of an input's elements; kTyped: they are T.
  template <bool kTyped>
  __device__ __forceinline__ static int size(const Stream& s) {
    return kTyped ? int(sizeof(T)) : bytes_of(s.dtype);
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
  __device__ __forceinline__ int64_t first() const { return chunk_of(begin_) + team_.rank; }

  // A thread's elements are numbered by its chunks, k * kElements + i. The number in the tensor of
  // one, and how many of them do not come behind element `last` of the tensor.
  __device__ __forceinline__ int64_t element_of(int place) const {
    return (first() + int64_t(place / kElements) * team_.size) * kElements + place % kElements;
  }
  __device__ __forceinline__ int up_to(int64_t last) const {
    const int64_t chunk = chunk_of(last) - first();
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
    if (valid != kAllValid || !s.aligned)
      return Edge::copy_some(to, from, kFull ? s.dtype : dtype_of<T>, valid);
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
  __device__ __forceinline__ Raw fetch_as_is(const Stream& s, int k, int64_t c, unsigned valid,
                                             T other) const {
    if (!s.data || s.broadcast) {
      if (s.data) other = *static_cast<const T*>(s.data);
      Raw out;
#pragma unroll
      for (T& x : out.at) x = other;
      return out;
    }
    const void* from = nullptr;
    if (valid == 0) {
    } else if (kKept && s.slot >= 0 && k < p_.resident) {
      from = slots_ + s.slot + (k * int(blockDim.x) + int(threadIdx.x)) * 16;
    } else if (valid == kAllValid && s.aligned) {
      from = static_cast<const T*>(s.data) + c * kElements;
    }
    if (from) return *static_cast<const Raw*>(from);
    return Edge::load_some(static_cast<const T*>(s.data) + c * kElements, valid);
  }

  const GroupParams& p_;
  Team& team_;
  unsigned char* slots_;
  // Of the group; begin_ and end_ are elements of the tensor. All else is computed from these:
  // registers are short.
  int64_t index_, begin_, end_;
};

}  // namespace embattle::cuda
