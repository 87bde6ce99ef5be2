// What the emulator's files share: its threads, which are fibres, and where they wait.
#pragma once

#include <vector>

#include "cuda_runtime.h"
#include "emulator.h"
#include "trace.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMU_ASAN 1
#else
#define EMU_ASAN 0
#endif

namespace emu {

constexpr size_t kStack = EMU_ASAN ? 1 << 20 : 64 << 10;
constexpr size_t kGuard = 4096;
constexpr size_t kRedzone = 128;  // between the shared memories of two blocks

enum class State : uint8_t {
  ready,
  block_barrier,
  warp_operation,
  cluster_barrier,
  grid_barrier,
  done
};
enum class Operation : uint8_t { barrier, exchange, ballot };

struct Copy {
  void* to;
  const void* from;
  size_t size;
};

struct Block;

struct Fibre {
  void* sp = nullptr;
  State state = State::done;
  Block* block = nullptr;
  unsigned thread = 0;  // in the block
  uint3 index{};
  // What it brought to the warp operation it waits at.
  Operation operation = Operation::barrier;
  unsigned mask = 0;
  unsigned source = 0;
  uint64_t value = 0;
  std::vector<Copy> copies;
  // Where memory accesses are counted.
  Log log;
  std::vector<uint64_t> chain;  // hashes of the functions that it is in
};

struct Warp {
  unsigned waiting = 0;  // lanes
  uint16_t epoch = 0;    // __syncwarp()s so far
};

// Threads with a barrier of their own: those of a block, a cluster, a cooperative grid.
struct Meeting {
  unsigned first = 0, threads = 0;  // its fibres
  unsigned waiting = 0, left = 0;
  uint16_t epoch = 0;  // barriers so far, those of larger meetings included
};

struct Cluster : Meeting {
  unsigned blocks = 0;
  Block* lead = nullptr;
};

struct Block : Meeting {
  uint3 index{};
  unsigned predicates = 0, answer = 0;
  unsigned rank = 0;
  unsigned char* shared = nullptr;
  Cluster* cluster = nullptr;
  bool visited = false;  // by another block of the cluster, since the last cluster barrier
  std::vector<Warp> warps;
};

// The last write and the last reads of a byte of shared memory.
struct Access {
  uint16_t thread = 0xffff;  // in the cohort; 0xffff: none yet
  uint16_t warp_epoch = 0, block_epoch = 0, cluster_epoch = 0;
  uint8_t scope = 0;  // 0: that thread alone; 1, 2, 3: others of its warp, block, cluster too
};
struct Cell {
  Access write, read;
};

struct Watched {
  unsigned char* begin = nullptr;
  unsigned char* end = nullptr;
  std::vector<Cell> cells;
  bool contains(const void* p) const { return p >= begin && p < end; }
};

// The emulator runs one launch at a time; this is all of it.
extern Device the_device;
extern Counters the_counters;
extern std::vector<char*> stacks;
extern std::vector<Fibre> fibres;
extern std::vector<Block> blocks;  // the cohort: the blocks that live side by side
extern std::vector<Cluster> clusters;
extern Meeting cohort;
extern Watched arena, statics;
extern size_t arena_stride, arena_size;
extern Launch current;
extern Fibre* self;
extern uint64_t progress;  // grows with whatever is not spinning

std::string where(const Fibre& f);

// ---- stacks.cpp ----

char* stack_of(size_t i);      // of fibre i of the cohort
void* first_frame(char* top);  // from where emu_switch enters emu_enter
void to_scheduler(bool for_good);
void to_fibre(Fibre& f);
void enter_fibre();  // first of all in a new fibre

// ---- barriers.cpp ----

// Counts what threads have accessed together, before they go their own ways.
void flush_threads(unsigned first, unsigned threads);
// The current thread is done: nobody may wait for it.
void leave_all();

// ---- watch.cpp ----

void poison(Watched& w);

}  // namespace emu
