// A team: the threads that work on one group together, and how they agree on a number.
//
//   lanes of a warp   power of two up to 32; short groups, several teams in a block
//   a block
//   a cluster         blocks that see each other's shared memory (compute capability 9.0 and up)
//   blocks at large   of a cooperative launch, through global memory
//
// All sums are formed in an order that depends on the team's shape alone: results are
// deterministic.
#pragma once

#include "device.cuh"

namespace embattle::cuda {

constexpr int kMaxWarps = 16;
constexpr int kMaxCluster = 8;

// Two sums and a maximum, agreed on together.
struct Sums {
  double a = 0, b = 0;
  double m = 0;
};
enum : int { kSumA = 1, kSumB = 2, kMax = 4 };

// In shared memory, at the front of a block's dynamic part. Two of each, used in turn: a round's
// writes then cannot overtake the reads of the round before.
struct TeamScratch {
  Sums warps[2][kMaxWarps];
  Sums blocks[2][kMaxCluster];
};
static_assert(sizeof(TeamScratch) % 16 == 0);

// In global memory, for each team of blocks at large; zeroed before the launch.
struct TeamGlobal {
  unsigned arrived;
  unsigned padding[31];
};

struct Shape {
  int lanes = 32;        // threads of a team inside one block: a power of two <= 32, or the block
  int blocks = 1;        // of a team
  bool cluster = false;  // how they meet, where there are several
};

// A team of lanes only: a power of two of them, up to 32. Its sums are inlined; calls would cost
// short kernels registers.
class Lanes {
 public:
  __device__ __forceinline__ explicit Lanes(int lanes)
      : rank(int(threadIdx.x) & (lanes - 1)),
        size(lanes),
        index(int64_t(blockIdx.x) * (int(blockDim.x) / lanes) + int(threadIdx.x) / lanes),
        count(int64_t(gridDim.x) * (int(blockDim.x) / lanes)),
        mask_((lanes == 32 ? 0xffffffffu : (1u << lanes) - 1) << ((int(threadIdx.x) & 31) - rank)) {
  }

  int rank, size;        // of this thread in its team
  int64_t index, count;  // of this team in the grid

  // What the lanes have read and written before is done. All lanes of the team call it.
  __device__ __forceinline__ void sync() const { __syncwarp(mask_); }
  // The same bits in every lane. All lanes of the team call it.
  __device__ __forceinline__ double sum(double a) const {
    for (int o = size / 2; o; o /= 2) a += __shfl_xor_sync(mask_, a, o);
    return a;
  }
  __device__ __forceinline__ double max(double m) const {
    for (int o = size / 2; o; o /= 2) m = larger(m, __shfl_xor_sync(mask_, m, o));
    return m;
  }

 private:
  unsigned mask_;
};

class Team {
 public:
  // All threads of the block call it; the shape outlives it. `shared`: a TeamScratch. `global` and
  // `slots` ([teams][2][blocks]) serve blocks at large.
  __device__ Team(const Shape& shape, unsigned char* shared, TeamGlobal* global = nullptr,
                  Sums* slots = nullptr)
      : shape_(shape),
        scratch_(reinterpret_cast<TeamScratch*>(shared)),
        global_(global),
        slots_(slots) {
    const int threads = int(blockDim.x);
    if (shape.lanes <= 32) {
      const int lane = int(threadIdx.x) & 31, first = lane & ~(shape.lanes - 1);
      mask_ = (shape.lanes == 32 ? 0xffffffffu : (1u << shape.lanes) - 1) << first;
      rank = lane - first;
      size = shape.lanes;
      index = int64_t(blockIdx.x) * (threads / shape.lanes) + threadIdx.x / shape.lanes;
      return;
    }
    block_ = shape.blocks == 1 ? 0 : int(blockIdx.x % unsigned(shape.blocks));
    rank = block_ * threads + int(threadIdx.x);
    size = shape.blocks * threads;
    index = blockIdx.x / unsigned(shape.blocks);
    if (shape.cluster) cluster_sync();  // the others have started: their shared memory is there
  }

  int rank, size;  // of this thread in its team
  int64_t index;   // of this team in the grid

  // The teams of the grid. Not kept: kernels need it when they are done with a group.
  __device__ int64_t count() const {
    return shape_.lanes <= 32 ? int64_t(gridDim.x) * (int(blockDim.x) / shape_.lanes)
                              : gridDim.x / unsigned(shape_.blocks);
  }

  // The sums and the maximum over the team, the same bits in every thread. `which` says which
  // members of Sums are wanted; the others are undefined. All threads of the team call it.
  __device__ __forceinline__ Sums agree(int which, const Sums& s) {
    turn_ ^= 1;
    if (shape_.lanes <= 32) return agree_lanes(which, s, mask_, shape_.lanes);
    if (shape_.blocks == 1) return agree_block(which, s, scratch_->warps[turn_]);
    if (shape_.cluster) return agree_cluster(which, s, scratch_, turn_, shape_.blocks, block_);
    const int64_t own = blockIdx.x / unsigned(shape_.blocks);
    return agree_blocks(which, s, scratch_, turn_, shape_.blocks, block_,
                        slots_ + own * 2 * shape_.blocks, global_ + own, ++round_);
  }

  __device__ double sum(double a) { return agree(kSumA, {.a = a}).a; }
  __device__ double max(double m) { return agree(kMax, {.m = m}).m; }

 private:
  static __device__ __forceinline__ Sums joined(int which, Sums s, const Sums& t) {
    if (which & kSumA) s.a += t.a;
    if (which & kSumB) s.b += t.b;
    if (which & kMax) s.m = larger(s.m, t.m);
    return s;
  }
  // From the second-level cache: another block has just written it.
  static __device__ Sums fresh(const Sums* p) {
    return {__ldcg(&p->a), __ldcg(&p->b), __ldcg(&p->m)};
  }

  // Not inlined, and one for all that can be wanted: a kernel agrees in several places, and has a
  // copy of each of these, which are long.

  static __device__ EMBATTLE_NOINLINE Sums agree_lanes(int which, Sums s, unsigned mask,
                                                       int lanes) {
    for (int o = lanes / 2; o; o /= 2) {
      if (which & kSumA) s.a += __shfl_xor_sync(mask, s.a, o);
      if (which & kSumB) s.b += __shfl_xor_sync(mask, s.b, o);
      if (which & kMax) s.m = larger(s.m, __shfl_xor_sync(mask, s.m, o));
    }
    return s;
  }

  static __device__ EMBATTLE_NOINLINE Sums agree_block(int which, Sums s, Sums* parts) {
    s = agree_lanes(which, s, 0xffffffffu, 32);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = s;
    __syncthreads();
    s = parts[0];
    for (int w = 1; w < int(blockDim.x) / 32; ++w) s = joined(which, s, parts[w]);
    return s;
  }

  static __device__ EMBATTLE_NOINLINE Sums agree_cluster(int which, Sums s, TeamScratch* scratch,
                                                         int turn, int blocks, int block) {
    s = agree_block(which, s, scratch->warps[turn]);
    if (int(threadIdx.x) < blocks) in_block(scratch, threadIdx.x)->blocks[turn][block] = s;
    cluster_sync();
    s = scratch->blocks[turn][0];
    for (int b = 1; b < blocks; ++b) s = joined(which, s, scratch->blocks[turn][b]);
    return s;
  }

  static __device__ EMBATTLE_NOINLINE Sums agree_blocks(int which, Sums s, TeamScratch* scratch,
                                                        int turn, int blocks, int block,
                                                        Sums* slots, TeamGlobal* global,
                                                        unsigned round) {
    s = agree_block(which, s, scratch->warps[turn]);
    slots += turn * blocks;
    if (threadIdx.x == 0) slots[block] = s;
    blocks_sync(&global->arrived, unsigned(blocks), round);
    if (threadIdx.x < 32) {  // each lane a stretch, then the lanes together
      Sums t{.m = fresh(slots).m};
      for (int b = int(threadIdx.x); b < blocks; b += 32) t = joined(which, t, fresh(slots + b));
      t = agree_lanes(which, t, 0xffffffffu, 32);
      if (threadIdx.x == 0) scratch->blocks[turn][0] = t;
    }
    __syncthreads();
    return scratch->blocks[turn][0];
  }

  // What the kernel was told is kept as it was told: it then stays in constant memory, and
  // registers are short.
  const Shape& shape_;
  TeamScratch* scratch_;
  TeamGlobal* global_;
  Sums* slots_;
  unsigned mask_ = 0xffffffffu;
  int block_ = 0;
  int turn_ = 0;
  unsigned round_ = 0;
};

}  // namespace embattle::cuda
