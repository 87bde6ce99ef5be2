// What kernels do to memory, counted as a GPU would: the accesses of a warp's lanes by one
// instruction are one request, which touches sectors of global memory or banks of shared memory.
//
// It counts where kernels were compiled with -fsanitize=thread, and where it was asked to. Lanes
// run one after another in the emulator, so each keeps a log; at barriers of the block and of the
// whole warp, and when threads have left, the n-th accesses of all lanes by one instruction (called
// by one chain of functions) are put together. What lies on a thread's stack, among the arguments
// of a kernel, or in the program itself is registers, constant memory or built-in variables on a
// GPU: it is left out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace emu {

struct Launch;

enum class Space : uint8_t { global, shared };
enum class Kind : uint8_t { read, write, copy, atomic };  // copy: asynchronous, global to shared

struct Logged {
  uint64_t key;  // of the instruction and its callers
  uint64_t at;
  uint64_t place;  // the return address of the hook, in the program
  uint32_t size;
  Space space;
  Kind kind;
};
using Log = std::vector<Logged>;

bool tracing();
// How many cohorts (blocks, clusters) of a launch are to run; 0: all. Cooperative ones run whole.
uint64_t trace_most();
void trace_launch(const Launch& launch, uint64_t cohorts, uint64_t ran, uint64_t blocks_ran);
void trace_memset(size_t bytes);
// A thread waits for so many bytes that it copies asynchronously.
void trace_wait(size_t bytes);
// An access of `size` bytes that counts as pieces of up to 16.
void trace_access(Log& log, uint64_t chain, const void* at, size_t size, Space space, Kind kind,
                  const void* place);
// Puts together what the lanes of a warp have logged, and empties their logs. nullptr: none.
void trace_flush(Log* const (&lanes)[32]);

// Of warp operations the lanes are counted, of barriers how often all have met.
enum class Event { block_barrier, warp_operation, cluster_barrier, grid_barrier };
void trace_event(Event event, unsigned times = 1);

// Whether an address is part of the running program or of the host's stack.
bool trace_ignores(const void* p);

}  // namespace emu
