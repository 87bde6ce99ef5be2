// Fibres, barriers and the shared-memory watch. Compiled without instrumentation of its own.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <vector>

#include "cuda_runtime.h"
#include "trace.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#define EMU_ASAN 1
#else
#define EMU_ASAN 0
#endif

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// The bounds of all static shared memory, given by the linker; null where there is none.
extern "C" {
extern unsigned char __start_emu_shared[] __attribute__((weak, visibility("hidden")));
extern unsigned char __stop_emu_shared[] __attribute__((weak, visibility("hidden")));
}

// ---- Switching stacks
// ------------------------------------------------------------------------------

// emu_switch(save, load): pushes the callee-saved registers, stores the stack pointer in *save, and
// goes on where the stack pointer `load` was stored.
extern "C" void emu_switch(void** save, void* load);
extern "C" void emu_enter();  // the first frame of a fibre

#if defined(__x86_64__)
asm(R"(
.text
.hidden emu_switch
.globl emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emu_switch, .-emu_switch
)");
static void* first_frame(char* top) {
  void** sp =
      reinterpret_cast<void**>(top) - 1;  // on entry sp + 8 is 16-byte aligned, as the ABI wants
  *sp = nullptr;                          // emu_enter never returns
  *--sp = reinterpret_cast<void*>(&emu_enter);
  for (int i = 0; i < 6; ++i) *--sp = nullptr;
  return sp;
}
#elif defined(__aarch64__)
asm(R"(
.text
.hidden emu_switch
.globl emu_switch
.type emu_switch,%function
emu_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size emu_switch, .-emu_switch
)");
static void* first_frame(char* top) {
  void** sp = reinterpret_cast<void**>(top) - 20;
  std::memset(sp, 0, 160);
  sp[11] = reinterpret_cast<void*>(&emu_enter);  // x30
  return sp;
}
#else
#error "the emulator switches stacks by hand: write emu_switch for this processor"
#endif

namespace emu {
namespace {

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

const char* name(Operation o) {
  return o == Operation::barrier ? "__syncwarp" : o == Operation::exchange ? "a shuffle" : "a vote";
}

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

// ---- All state: the emulator runs one launch at a time
// ---------------------------------------------

Device the_device;
Counters the_counters;
std::string the_error;
Order the_order = Order::forward;
std::mt19937 the_random;

std::vector<char*> stacks;
std::vector<Fibre> fibres;
std::vector<Block> blocks;  // the cohort: the blocks that live side by side
std::vector<Cluster> clusters;
Meeting cohort;
std::vector<unsigned char> arena_memory;
Watched arena, statics;
size_t arena_stride = 0, arena_size = 0;

Launch current;
Fibre* self = nullptr;
void* scheduler_sp = nullptr;
bool failed = false;
uint64_t progress = 0;  // grows with whatever is not spinning
#if EMU_ASAN
const void* scheduler_stack = nullptr;
size_t scheduler_stack_size = 0;
void* scheduler_fake = nullptr;
#endif

std::string where(const Fibre& f) {
  const uint3 b = f.block->index, t = f.index;
  char text[128];
  std::snprintf(text, sizeof text, "thread (%u,%u,%u) of block (%u,%u,%u)", t.x, t.y, t.z, b.x, b.y,
                b.z);
  return text;
}

void to_scheduler(bool for_good) {
#if EMU_ASAN
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, scheduler_stack, scheduler_stack_size);
#else
  (void)for_good;
#endif
  emu_switch(&self->sp, scheduler_sp);
#if EMU_ASAN
  __sanitizer_finish_switch_fiber(fake, &scheduler_stack, &scheduler_stack_size);
#endif
}

void to_fibre(Fibre& f) {
  self = &f;
  threadIdx = f.index;
  blockIdx = f.block->index;
#if EMU_ASAN
  __sanitizer_start_switch_fiber(&scheduler_fake, stacks[&f - fibres.data()] + kGuard, kStack);
#endif
  emu_switch(&scheduler_sp, f.sp);
#if EMU_ASAN
  __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#endif
}

void record_failure(const std::string& what) {
  failed = true;
  if (the_error.empty()) the_error = what;
}

void wait(State state) {
  self->state = state;
  to_scheduler(false);
}

char* stack_of(size_t i) {
  while (stacks.size() <= i) {
    void* memory = mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      std::perror("emulator: mmap of a fibre's stack");
      std::abort();
    }
    mprotect(memory, kGuard, PROT_NONE);
    stacks.push_back(static_cast<char*>(memory));
  }
#if EMU_ASAN
  __asan_unpoison_memory_region(stacks[i] + kGuard, kStack);  // frames of an earlier fibre
#endif
  return stacks[i];
}

// ---- Counting
// --------------------------------------------------------------------------------------

// Puts together what a warp, or every warp of a stretch of whole blocks, has logged.
void flush_warp(Fibre* lanes, unsigned count) {
  Log* logs[32] = {};
  for (unsigned l = 0; l < count; ++l) logs[l] = &lanes[l].log;
  trace_flush(logs);
}
void flush_threads(unsigned first, unsigned threads) {
  for (unsigned t = first; t < first + threads;) {
    const Fibre& f = fibres[t];
    const unsigned count = std::min(32u, f.block->threads - f.thread);
    flush_warp(&fibres[t], count);
    t += count;
  }
}

void count_access(const void* address, size_t size, Kind kind, const void* place) {
  const auto* p = static_cast<const unsigned char*>(address);
  const auto* stack = reinterpret_cast<const unsigned char*>(stacks[size_t(self - fibres.data())]);
  if (p >= stack && p < stack + kGuard + kStack) return;
  const bool shared = arena.contains(p) || statics.contains(p);
  if (!shared && trace_ignores(p)) return;
  trace_access(self->log, self->chain.empty() ? 0 : self->chain.back(), p, size,
               shared ? Space::shared : Space::global, kind, place);
}

// ---- Barriers
// --------------------------------------------------------------------------------------

// Waits for all of a meeting. True in the thread that comes last, which then finds all ready.
bool meet(Meeting& m, State state, const char* barrier, const char* meeting) {
  if (m.left)
    fail("divergent barrier: " + where(*self) + " waits at " + barrier + ", which " +
         std::to_string(m.left) + " threads of the " + meeting + " left without reaching it");
  if (++m.waiting != m.threads) {
    wait(state);
    return false;
  }
  m.waiting = 0;
  ++m.epoch;
  ++progress;
  if (tracing()) {
    flush_threads(m.first, m.threads);
    trace_event(state == State::block_barrier     ? Event::block_barrier
                : state == State::cluster_barrier ? Event::cluster_barrier
                                                  : Event::grid_barrier);
  }
  for (unsigned t = 0; t < m.threads; ++t) fibres[m.first + t].state = State::ready;
  return true;
}

// A thread is done: nobody may wait for it.
void leave(Meeting& m, const char* barrier, const char* meeting) {
  ++m.left;
  if (m.waiting)
    fail("divergent barrier: " + where(*self) + " leaves while " + std::to_string(m.waiting) +
         " threads of the " + meeting + " wait at " + barrier);
}

const char kBlockBarrier[] = "__syncthreads";
const char kClusterBarrier[] = "a cluster barrier";
const char kGridBarrier[] = "a grid barrier";

// The lanes of the current thread's warp, from lane 0.
Fibre* warp_of(const Fibre& f) { return &fibres[f.block->first + (f.thread & ~31u)]; }
unsigned lanes_of(const Fibre& f) { return std::min(32u, f.block->threads - (f.thread & ~31u)); }

// Waits until all lanes of the mask have come, then every lane's answer is in `value`.
void warp_operation(Operation operation, unsigned mask) {
  Fibre& f = *self;
  Warp& w = f.block->warps[f.thread / 32];
  Fibre* lanes = warp_of(f);
  const unsigned self_lane = f.thread & 31, count = lanes_of(f);
  if (!(mask >> self_lane & 1))
    fail(where(f) + ": " + name(operation) + " with a mask that does not name the calling lane");
  for (unsigned l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    if (l >= count) {
      // A warp may be cut short by the block's size; naming lanes that never were is an error there
      // too.
      fail(where(f) + ": " + name(operation) + " names lane " + std::to_string(l) +
           ", which the block does not have");
    }
    if (lanes[l].state == State::done)
      fail(where(f) + ": " + name(operation) + " names lane " + std::to_string(l) +
           ", which has left");
    if (w.waiting >> l & 1 && (lanes[l].operation != operation || lanes[l].mask != mask))
      fail("lanes meet in different operations: " + where(f) + " in " + name(operation) + ", " +
           where(lanes[l]) + " in " + name(lanes[l].operation) + " or with another mask");
  }
  f.operation = operation;
  f.mask = mask;
  w.waiting |= 1u << self_lane;
  if ((w.waiting & mask) != mask) {
    wait(State::warp_operation);
    return;
  }
  w.waiting &= ~mask;
  ++progress;
  if (tracing()) {
    if (mask == ~0u) flush_warp(lanes, count);
    trace_event(Event::warp_operation, unsigned(__builtin_popcount(mask)));
  }
  if (operation == Operation::barrier) {
    ++w.epoch;
  } else {
    uint64_t brought[32] = {}, votes = 0;
    for (unsigned l = 0; l < count; ++l) {
      if (!(mask >> l & 1)) continue;
      brought[l] = lanes[l].value;
      votes |= uint64_t(lanes[l].value != 0) << l;
    }
    for (unsigned l = 0; l < count; ++l) {
      if (!(mask >> l & 1)) continue;
      if (operation == Operation::ballot) {
        lanes[l].value = votes;
      } else if (lanes[l].source >= 32 || !(mask >> lanes[l].source & 1)) {
        fail(where(lanes[l]) + ": a shuffle reads lane " + std::to_string(lanes[l].source) +
             ", which is not in its mask");
      } else {
        lanes[l].value = brought[lanes[l].source];
      }
    }
  }
  for (unsigned l = 0; l < count; ++l)
    if (mask >> l & 1) lanes[l].state = State::ready;
}

// ---- The watch on shared memory
// --------------------------------------------------------------------

Access now() {
  Access a;
  a.thread = uint16_t(self - fibres.data());
  a.warp_epoch = self->block->warps[self->thread / 32].epoch;
  a.block_epoch = self->block->epoch;
  a.cluster_epoch = self->block->cluster->epoch;
  return a;
}

// Whether a barrier lies between an earlier access and the current thread.
bool ordered(const Access& a, const Access& by) {
  if (a.thread == 0xffff || (a.thread == by.thread && a.scope == 0)) return true;
  if (a.cluster_epoch != by.cluster_epoch) return true;
  const Fibre& other = fibres[a.thread];
  if (other.block != self->block || a.scope > 2) return false;
  if (a.block_epoch != by.block_epoch) return true;
  return other.thread / 32 == self->thread / 32 && a.scope <= 1 && a.warp_epoch != by.warp_epoch;
}

uint8_t scope_of(const Access& a) {
  const Fibre& other = fibres[a.thread];
  return other.block != self->block ? 3 : other.thread / 32 != self->thread / 32 ? 2 : 1;
}

void check_bounds(const unsigned char* p, size_t size) {
  const size_t at = size_t(p - arena.begin), slot = at / arena_stride;
  if (at % arena_stride + size > arena_size)
    fail(where(*self) + ": shared memory accessed out of bounds, " +
         std::to_string(at % arena_stride) + " + " + std::to_string(size) + " of " +
         std::to_string(arena_size) + " bytes");
  Block& owner = blocks[slot];
  if (&owner == self->block) return;
  if (owner.cluster != self->block->cluster)
    fail(where(*self) + ": accesses the shared memory of another cluster");
  if (owner.left)
    fail(where(*self) +
         ": accesses the shared memory of a block that leaves, with no barrier between");
  owner.visited = true;
}

void watch(const void* address, size_t size, bool write, bool atomic = false) {
  if (!self) return;
  ++the_counters.accesses;
  if (tracing()) return;  // one or the other: that is for other tests
  const auto* p = static_cast<const unsigned char*>(address);
  Watched* w = arena.contains(p) ? &arena : statics.contains(p) ? &statics : nullptr;
  if (!w) return;
  if (w == &arena) check_bounds(p, size);
  if (w == &statics && blocks.size() > 1)
    fail(where(*self) + ": static shared memory is not emulated where blocks live side by side");
  const Access a = now();
  Cell* cell = &w->cells[size_t(p - w->begin)];
  for (size_t i = 0; i < size && p + i < w->end; ++i, ++cell) {
    if (!write && cell->write.thread == 0xffff)
      fail(where(*self) + ": reads shared memory that was not written, byte " +
           std::to_string(p + i - (w == &arena ? self->block->shared : w->begin)));
    if (atomic) continue;
    if (!ordered(cell->write, a))
      fail("race on shared memory: " + where(*self) + (write ? " writes" : " reads") + " byte " +
           std::to_string(p + i - w->begin) + ", which " + where(fibres[cell->write.thread]) +
           " wrote, with no barrier between them");
    if (write) {
      if (!ordered(cell->read, a))
        fail("race on shared memory: " + where(*self) + " writes byte " +
             std::to_string(p + i - w->begin) + ", which " + where(fibres[cell->read.thread]) +
             " read, with no barrier between them");
      cell->write = a;
    } else if (ordered(cell->read, a)) {
      cell->read = a;
    } else {
      const uint8_t scope = std::max(cell->read.scope, scope_of(cell->read));
      cell->read = a;
      cell->read.scope = scope;
    }
  }
}

void poison(Watched& w) {
  if (w.begin == w.end) return;
  std::memset(w.begin, 0xff, size_t(w.end - w.begin));
  w.cells.assign(size_t(w.end - w.begin), Cell{});
}

// ---- Scheduling
// ------------------------------------------------------------------------------------

std::string stuck() {
  unsigned at_block = 0, at_warp = 0, at_cluster = 0, at_grid = 0, left = 0;
  for (const Fibre& f : fibres) {
    at_block += f.state == State::block_barrier;
    at_warp += f.state == State::warp_operation;
    at_cluster += f.state == State::cluster_barrier;
    at_grid += f.state == State::grid_barrier;
    left += f.state == State::done;
  }
  return "deadlock: of " + std::to_string(fibres.size()) + " threads " + std::to_string(at_block) +
         " wait at __syncthreads, " + std::to_string(at_warp) + " in a warp operation, " +
         std::to_string(at_cluster) + " at a cluster barrier, " + std::to_string(at_grid) +
         " at a grid barrier, and " + std::to_string(left) + " have left";
}

void order(std::vector<unsigned>& items) {
  if (the_order == Order::random) std::shuffle(items.begin(), items.end(), the_random);
}

void run_cohort() {
  std::vector<unsigned> turns(fibres.size());
  std::iota(turns.begin(), turns.end(), 0u);
  if (the_order == Order::reverse) std::reverse(turns.begin(), turns.end());
  uint64_t seen = progress;
  for (unsigned idle = 0;;) {
    order(turns);
    bool ran = false, all_left = true;
    for (unsigned i : turns) {
      Fibre& f = fibres[i];
      all_left &= f.state == State::done;
      if (f.state != State::ready) continue;
      ran = true;
      to_fibre(f);
      self = nullptr;
      if (failed) return;
    }
    if (all_left) return;
    if (!ran) return record_failure(stuck());
    idle = progress == seen ? idle + 1 : 0;
    seen = progress;
    if (idle > 10000)
      return record_failure("threads spin for ever: what they wait for never happens");
  }
}

bool wants_refused() {
  if (!the_device.refusals || (the_device.spared && the_device.spared--)) return false;
  --the_device.refusals;
  return true;
}

bool check_launch(const Launch& l) {
  const uint64_t threads = uint64_t(l.block.x) * l.block.y * l.block.z;
  const uint64_t grid = uint64_t(l.grid.x) * l.grid.y * l.grid.z;
  const unsigned cluster = l.cluster.x * l.cluster.y * l.cluster.z;
  std::string what;
  if (wants_refused()) what = "as the test wants it";
  if (grid == 0) what = "an empty grid";
  if (l.grid.x > 0x7fffffffu || l.grid.y > 65535 || l.grid.z > 65535) what = "too large a grid";
  if (threads == 0 || threads > 1024) what = std::to_string(threads) + " threads in a block";
  if (l.dynamic_shared > l.shared_limit)
    what = std::to_string(l.dynamic_shared) + " bytes of shared memory where " +
           std::to_string(l.shared_limit) + " are allowed (cudaFuncSetAttribute)";
  if (cluster > 1) {
    if (the_device.capability_major < 9) what = "clusters on a device without them";
    if (cluster > unsigned(the_device.max_cluster))
      what = "a cluster of " + std::to_string(cluster);
    if (l.grid.x % l.cluster.x || l.grid.y % l.cluster.y || l.grid.z % l.cluster.z)
      what = "a grid that is no multiple of the cluster";
  }
  if (what.empty() && l.cooperative) {
    const uint64_t fit = blocks_at_once(unsigned(threads), l.dynamic_shared);
    if (grid * threads >= 0xffff) what = "more threads side by side than are told apart here";
    if (!the_device.cooperative) what = "a cooperative grid on a device without them";
    if (grid > fit * uint64_t(the_device.multiprocessors))
      what = "a cooperative grid of " + std::to_string(grid) + " blocks that do not fit the device";
  }
  if (!what.empty()) record_failure("launch refused: " + what);
  return what.empty();
}

// Sets up the fibres of blocks [first, first + count) of the grid.
void prepare(uint64_t first, unsigned count, unsigned cluster) {
  const Launch& l = current;
  const unsigned threads = l.block.x * l.block.y * l.block.z;
  fibres.resize(size_t(count) * threads);
  blocks.assign(count, Block{});
  clusters.assign(count / cluster, Cluster{});
  cohort = Meeting{};
  cohort.threads = count * threads;
  arena_size = l.dynamic_shared;
  arena_stride = (l.dynamic_shared + 127) / 128 * 128 + kRedzone;
#if EMU_ASAN
  // Growing copies what is there, the red zones of the launch before included.
  __asan_unpoison_memory_region(arena_memory.data(), arena_memory.size());
#endif
  arena_memory.resize(arena_stride * count + 128);
  arena.begin = reinterpret_cast<unsigned char*>(
      (reinterpret_cast<uintptr_t>(arena_memory.data()) + 127) / 128 * 128);
  arena.end = arena.begin + arena_stride * count;
#if EMU_ASAN
  __asan_unpoison_memory_region(arena.begin, arena_stride * count);
#endif
  poison(arena);
  statics.begin = __start_emu_shared;
  statics.end = __stop_emu_shared;
  poison(statics);
  for (unsigned b = 0; b < count; ++b) {
    Block& block = blocks[b];
    const uint64_t at = first + b;
    block.index = {unsigned(at % l.grid.x), unsigned(at / l.grid.x % l.grid.y),
                   unsigned(at / l.grid.x / l.grid.y)};
    block.first = b * threads;
    block.threads = threads;
    block.rank = b % cluster;
    block.shared = arena.begin + arena_stride * b;
    block.warps.assign((threads + 31) / 32, Warp{});
    block.cluster = &clusters[b / cluster];
    if (block.rank == 0) {
      block.cluster->lead = &block;
      block.cluster->first = block.first;
    }
    block.cluster->threads += threads;
    ++block.cluster->blocks;
#if EMU_ASAN
    __asan_poison_memory_region(block.shared + (arena_size + 7) / 8 * 8,
                                arena_stride - (arena_size + 7) / 8 * 8);
#endif
    for (unsigned t = 0; t < threads; ++t) {
      Fibre& f = fibres[block.first + t];
      char* stack = stack_of(block.first + t);
      f.sp = first_frame(stack + kGuard + kStack);
      f.state = State::ready;
      f.block = &block;
      f.thread = t;
      f.index = {t % l.block.x, t / l.block.x % l.block.y, t / (l.block.x * l.block.y)};
      f.copies.clear();
      f.log.clear();
      f.chain.clear();
    }
  }
}

}  // namespace

// ---- The interface
// ---------------------------------------------------------------------------------

Device& device() { return the_device; }
bool has_clusters() {
  return the_device.capability_major >= 9 && (the_device.code == 0 || the_device.code >= 90);
}

unsigned blocks_at_once(unsigned threads, size_t dynamic_shared) {
  const Device& d = the_device;
  const unsigned most =
      std::min(d.threads_per_multiprocessor, d.registers_per_multiprocessor / d.registers) /
      threads;
  return std::min(most, unsigned(size_t(d.shared_per_multiprocessor) / (dynamic_shared + 1024)));
}
Counters& counters() { return the_counters; }

void set_order(Order order_, uint32_t seed) {
  the_order = order_;
  the_random.seed(seed);
}

std::string take_error() {
  std::string error;
  std::swap(error, the_error);
  return error;
}

bool launch_on_host() {
  if (wants_refused()) {
    record_failure("launch refused: as the test wants it");
    return false;
  }
  ++the_counters.launches;
  return true;
}

bool run(const Launch& launch) {
  failed = false;
  if (!check_launch(launch)) return false;
  current = launch;
  blockDim = dim3(launch.block.x, launch.block.y, launch.block.z);
  gridDim = dim3(launch.grid.x, launch.grid.y, launch.grid.z);
  const uint64_t grid = uint64_t(launch.grid.x) * launch.grid.y * launch.grid.z;
  const unsigned cluster = launch.cluster.x * launch.cluster.y * launch.cluster.z;
  const unsigned cohort = launch.cooperative ? unsigned(grid) : cluster;
  ++the_counters.launches;
  the_counters.blocks += grid;
  the_counters.threads += grid * launch.block.x * launch.block.y * launch.block.z;
  the_counters.cluster_launches += cluster > 1;
  the_counters.cooperative_launches += launch.cooperative;
  the_counters.largest_shared =
      std::max<uint64_t>(the_counters.largest_shared, launch.dynamic_shared);
  std::vector<unsigned> turns(grid / cohort);
  std::iota(turns.begin(), turns.end(), 0u);
  if (const uint64_t most = trace_most(); most && turns.size() > most) {
    for (uint64_t i = 0; i < most; ++i) turns[i] = unsigned(i * turns.size() / most);
    turns.resize(most);
  }
  if (the_order == Order::reverse) std::reverse(turns.begin(), turns.end());
  order(turns);
  for (unsigned i : turns) {
    prepare(uint64_t(i) * cohort, cohort, cluster);
    run_cohort();
    self = nullptr;
    if (failed) break;
    if (tracing()) flush_threads(0, unsigned(fibres.size()));
  }
  if (tracing()) trace_launch(launch, grid / cohort, turns.size(), turns.size() * cohort);
  arena.begin = arena.end = nullptr;
  return !failed;
}

void fail(const std::string& what) {
  record_failure(what);
  if (!self) {
    std::fprintf(stderr, "emulator: %s\n", what.c_str());
    std::abort();
  }
  self->state = State::done;
  to_scheduler(true);
  std::abort();  // an abandoned fibre is never resumed
}

unsigned lane() { return self->thread & 31; }

unsigned block_barrier_count(unsigned predicate) {
  Block& b = *self->block;
  b.predicates += predicate;
  if (meet(b, State::block_barrier, kBlockBarrier, "block")) {
    b.answer = b.predicates;
    b.predicates = 0;
  }
  return b.answer;
}

void block_barrier() { block_barrier_count(0); }

void warp_barrier(unsigned mask) { warp_operation(Operation::barrier, mask); }

uint64_t exchange(unsigned mask, uint64_t value, unsigned source) {
  self->value = value;
  self->source = source;
  warp_operation(Operation::exchange, mask);
  return self->value;
}

unsigned ballot(unsigned mask, bool predicate) {
  self->value = predicate;
  warp_operation(Operation::ballot, mask);
  return unsigned(self->value);
}

unsigned char* dynamic_shared() { return self->block->shared; }
// Code for older devices has no cluster operations, and goes on without (csrc/cuda/device.cuh).
unsigned cluster_rank() { return has_clusters() ? self->block->rank : 0; }
unsigned cluster_size() { return self->block->cluster->blocks; }

void cluster_barrier() {
  if (!has_clusters()) return;
  Cluster& c = *self->block->cluster;
  if (!meet(c, State::cluster_barrier, kClusterBarrier, "cluster")) return;
  for (unsigned b = 0; b < c.blocks; ++b) c.lead[b].visited = false;
}

void grid_barrier() {
  if (!current.cooperative)
    fail(where(*self) + ": a grid barrier in a launch that is not cooperative");
  if (!meet(cohort, State::grid_barrier, kGridBarrier, "grid")) return;
  for (Cluster& c : clusters) ++c.epoch;
  for (Block& b : blocks) b.visited = false;
}

void* map_shared_rank(const void* p, unsigned rank) {
  if (!has_clusters()) return const_cast<void*>(p);
  const Cluster& c = *self->block->cluster;
  const auto* at = static_cast<const unsigned char*>(p);
  if (rank >= c.blocks)
    fail(where(*self) + ": maps block " + std::to_string(rank) + " of its cluster");
  if (at < self->block->shared || at > self->block->shared + arena_size)
    fail(where(*self) + ": maps an address that is not in its own shared memory");
  return c.lead[rank].shared + (at - self->block->shared);
}

void spin() { to_scheduler(false); }

void async_copy(void* to, const void* from, size_t size) {
  if (tracing()) {
    count_access(from, size, Kind::copy, __builtin_return_address(0));
    count_access(to, size, Kind::write, __builtin_return_address(0));
  }
  self->copies.push_back({to, from, size});
}

void async_wait() {
  if (tracing()) {
    size_t bytes = 0;
    for (const Copy& c : self->copies) bytes += c.size;
    trace_wait(bytes);
  }
  for (const Copy& c : self->copies) {
    watch(c.to, c.size, true);
    std::memcpy(c.to, c.from, c.size);
  }
  self->copies.clear();
}

void atomic_access(const void* p, size_t size) {
  ++progress;
  if (tracing()) count_access(p, size, Kind::atomic, __builtin_return_address(0));
  if (!EMU_ASAN) watch(p, size, false, true);  // writes are not reported there
}

}  // namespace emu

extern "C" void emu_enter() {
  using namespace emu;
#if EMU_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_stack_size);
#endif
  current.body(current.context);
  Fibre& f = *self;
  if (!f.copies.empty()) fail(where(f) + ": leaves without waiting for its asynchronous copies");
  ++progress;
  leave(*f.block, kBlockBarrier, "block");
  leave(*f.block->cluster, kClusterBarrier, "cluster");
  leave(cohort, kGridBarrier, "grid");
  if (f.block->visited)
    fail(where(f) +
         ": leaves while another block may use its shared memory, with no barrier between");
  f.state = State::done;
  to_scheduler(true);
  std::abort();
}

// ---- What -fsanitize=thread makes the compiler call
// -------------------------------------------------

namespace emu {
namespace {
void seen(const void* p, size_t size, bool write, const void* place) {
  if (tracing() && self)
    count_access(p, size, write ? Kind::write : Kind::read, place);
  else
    watch(p, size, write);
}
}  // namespace
}  // namespace emu

#define EMU_HOOK(name, size, write)                                     \
  extern "C" __attribute__((visibility("hidden"))) void name(void* p) { \
    emu::seen(p, size, write, __builtin_return_address(0));             \
  }
EMU_HOOK(__tsan_read1, 1, false)
EMU_HOOK(__tsan_read2, 2, false)
EMU_HOOK(__tsan_read4, 4, false)
EMU_HOOK(__tsan_read8, 8, false)
EMU_HOOK(__tsan_read16, 16, false)
EMU_HOOK(__tsan_write1, 1, true)
EMU_HOOK(__tsan_write2, 2, true)
EMU_HOOK(__tsan_write4, 4, true)
EMU_HOOK(__tsan_write8, 8, true)
EMU_HOOK(__tsan_write16, 16, true)
EMU_HOOK(__tsan_unaligned_read2, 2, false)
EMU_HOOK(__tsan_unaligned_read4, 4, false)
EMU_HOOK(__tsan_unaligned_read8, 8, false)
EMU_HOOK(__tsan_unaligned_read16, 16, false)
EMU_HOOK(__tsan_unaligned_write2, 2, true)
EMU_HOOK(__tsan_unaligned_write4, 4, true)
EMU_HOOK(__tsan_unaligned_write8, 8, true)
EMU_HOOK(__tsan_unaligned_write16, 16, true)
#undef EMU_HOOK
#define EMU_HIDDEN extern "C" __attribute__((visibility("hidden")))
EMU_HIDDEN void __tsan_read_range(void* p, unsigned long size) {
  emu::seen(p, size, false, __builtin_return_address(0));
}
EMU_HIDDEN void __tsan_write_range(void* p, unsigned long size) {
  emu::seen(p, size, true, __builtin_return_address(0));
}
EMU_HIDDEN void __tsan_volatile_read4(void* p) {
  emu::seen(p, 4, false, __builtin_return_address(0));
}
EMU_HIDDEN void __tsan_volatile_write4(void* p) {
  emu::seen(p, 4, true, __builtin_return_address(0));
}
EMU_HIDDEN void __tsan_vptr_update(void*, void*) {}
EMU_HIDDEN void __tsan_func_entry(void* caller) {
  if (!emu::tracing() || !emu::self) return;
  auto& chain = emu::self->chain;
  chain.push_back((chain.empty() ? 0 : chain.back()) * 0x9e3779b97f4a7c15u +
                  reinterpret_cast<uintptr_t>(caller));
}
EMU_HIDDEN void __tsan_func_exit() {
  if (emu::tracing() && emu::self && !emu::self->chain.empty()) emu::self->chain.pop_back();
}
EMU_HIDDEN void __tsan_init() {}
