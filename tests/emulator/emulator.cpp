// Launches: the order of fibres, what a device refuses, and what is set up for a block.
// Compiled without instrumentation of its own, as all of the emulator.
#include "emulator.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>

#include "fibres.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// The bounds of all static shared memory, given by the linker; null where there is none.
extern "C" {
extern unsigned char __start_emu_shared[] __attribute__((weak, visibility("hidden")));
extern unsigned char __stop_emu_shared[] __attribute__((weak, visibility("hidden")));
}

namespace emu {

Device the_device;
Counters the_counters;
std::vector<char*> stacks;
std::vector<Fibre> fibres;
std::vector<Block> blocks;  // the cohort: the blocks that live side by side
std::vector<Cluster> clusters;
Meeting cohort;
Watched arena, statics;
size_t arena_stride = 0, arena_size = 0;

Launch current;
Fibre* self = nullptr;
uint64_t progress = 0;  // grows with whatever is not spinning

namespace {

std::string the_error;
Order the_order = Order::forward;
std::mt19937 the_random;
std::vector<unsigned char> arena_memory;
bool failed = false;

void record_failure(const std::string& what) {
  failed = true;
  if (the_error.empty()) the_error = what;
}

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

std::string where(const Fibre& f) {
  const uint3 b = f.block->index, t = f.index;
  char text[128];
  std::snprintf(text, sizeof text, "thread (%u,%u,%u) of block (%u,%u,%u)", t.x, t.y, t.z, b.x, b.y,
                b.z);
  return text;
}

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

void spin() { to_scheduler(false); }

}  // namespace emu

extern "C" void emu_enter() {
  using namespace emu;
  enter_fibre();
  current.body(current.context);
  Fibre& f = *self;
  if (!f.copies.empty()) fail(where(f) + ": leaves without waiting for its asynchronous copies");
  ++progress;
  leave_all();
  if (f.block->visited)
    fail(where(f) +
         ": leaves while another block may use its shared memory, with no barrier between");
  f.state = State::done;
  to_scheduler(true);
  std::abort();
}
