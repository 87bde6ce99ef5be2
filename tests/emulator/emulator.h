// The emulator's own interface: what <cuda_runtime.h> next door is built on, and what tests steer.
//
// A CUDA thread is a fibre with a stack of its own; all fibres run on one operating-system thread,
// one at a time, and hand over only where a CUDA thread may wait: barriers, warp shuffles,
// spinning. Blocks run one after another, unless they belong to one cluster or to a cooperative
// launch: those live side by side.
//
// What is checked, always:
//   - barriers: a __syncthreads() that part of a block never reaches, lanes of a warp that meet in
//     different operations or name lanes that have left, clusters and grids that wait for a block
//     that is gone;
//   - a shuffle that reads a lane outside its mask;
//   - launches beyond the device's limits (threads, shared memory, cluster size, co-residency).
// What is checked where the kernels were compiled with -fsanitize=thread (the emulator supplies the
// callbacks itself; the ThreadSanitizer runtime is not linked):
//   - shared memory read before it was written in this block;
//   - shared memory accessed outside the block's allocation;
//   - two threads that touch the same byte of shared memory, one of them writing, with no barrier
//     between them that both took part in.
// Shared memory is filled with 0xff (a NaN in every float format) before a block starts.
//
// Not emulated: memory ordering between threads of global memory, PTX, timing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace emu {

// ---- What tests steer
// ------------------------------------------------------------------------------

// In which order runnable threads (and blocks) get their turn.
enum class Order { forward, reverse, random };

struct Device {
  int multiprocessors = 4;
  int capability_major = 9;
  int capability_minor = 0;
  int code = 0;  // what kernels were compiled for, 10 * major + minor; 0: for this device
  int shared_per_block = 227 << 10;  // dynamic shared memory that a kernel may opt in to
  int shared_per_multiprocessor = 228 << 10;
  int threads_per_multiprocessor = 2048;
  int registers_per_multiprocessor = 65536;
  int registers = 128;  // of a thread of any kernel: they are not known here
  bool cooperative = true;
  unsigned refusals = 0;  // launches that are refused whatever they ask for,
  unsigned spared = 0;    // after so many others
  int max_cluster = 8;
};

Device& device();
// Whether kernels may use clusters: on this device, and as they were compiled.
bool has_clusters();
// Blocks that a multiprocessor has room for.
unsigned blocks_at_once(unsigned threads, size_t dynamic_shared);
void set_order(Order order, uint32_t seed);

// What went wrong in launches since the last call, the first failure only; empty if nothing did.
// The error that the runtime keeps (cudaGetLastError) stays.
std::string take_error();

// Counts since the last reset: a test can tell whether a path was taken.
struct Counters {
  uint64_t launches = 0;
  uint64_t blocks = 0;
  uint64_t threads = 0;
  uint64_t cluster_launches = 0;
  uint64_t cooperative_launches = 0;
  uint64_t largest_shared = 0;  // dynamic shared memory of a block, in bytes
  uint64_t lowered_limits = 0;  // how often a kernel's limit of it was lowered
  uint64_t accesses = 0;        // of memory by kernels, where they are watched
};
Counters& counters();

// ---- What <cuda_runtime.h> needs
// -------------------------------------------------------------------

struct Dim {
  unsigned x = 1, y = 1, z = 1;
};

struct Launch {
  Dim grid, block, cluster;
  size_t dynamic_shared = 0;
  size_t shared_limit = 48 << 10;  // what cudaFuncSetAttribute allowed for this kernel
  bool cooperative = false;
  const void* kernel = nullptr;
  void (*body)(void*) = nullptr;  // runs the kernel once, as the current thread
  void* context = nullptr;
};

// Runs every block. False after a failure, which take_error() then tells.
bool run(const Launch& launch);
// A launch whose work the host does: counted, and false where the test wants it refused.
bool launch_on_host();

unsigned lane();  // of the current thread, 0..31
void block_barrier();
unsigned block_barrier_count(unsigned predicate);  // how many threads came with a true predicate
void warp_barrier(unsigned mask);
// The values of up to 8 bytes that lane `source` brings.
uint64_t exchange(unsigned mask, uint64_t value, unsigned source);
// Bit i: lane i of the mask came with a true predicate.
unsigned ballot(unsigned mask, bool predicate);

unsigned char* dynamic_shared();  // of the current block, 128-byte aligned
unsigned cluster_rank();
unsigned cluster_size();
void cluster_barrier();
void grid_barrier();  // of a cooperative launch
// The address in block `rank` of the cluster that corresponds to `p` in this block.
void* map_shared_rank(const void* p, unsigned rank);

void spin();  // another thread's turn, while waiting for memory to change
void async_copy(void* to, const void* from, size_t size);  // takes effect in async_wait()
void async_wait();

// An atomic access: initialised memory is required, races are not looked for.
void atomic_access(const void* p, size_t size);

[[noreturn]] void fail(const std::string& what);  // from inside a kernel: ends the launch

}  // namespace emu
