// The watch on memory: races on shared memory, what is not written or out of bounds; or counts of
// accesses, where those are traced. And what the compiler calls with -fsanitize=thread.
#include <algorithm>
#include <cstring>

#include "fibres.h"

namespace emu {
namespace {

void count_access(const void* address, size_t size, Kind kind, const void* place) {
  const auto* p = static_cast<const unsigned char*>(address);
  const auto* stack = reinterpret_cast<const unsigned char*>(stacks[size_t(self - fibres.data())]);
  if (p >= stack && p < stack + kGuard + kStack) return;
  const bool shared = arena.contains(p) || statics.contains(p);
  if (!shared && trace_ignores(p)) return;
  trace_access(self->log, self->chain.empty() ? 0 : self->chain.back(), p, size,
               shared ? Space::shared : Space::global, kind, place);
}

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

}  // namespace

void poison(Watched& w) {
  if (w.begin == w.end) return;
  std::memset(w.begin, 0xff, size_t(w.end - w.begin));
  w.cells.assign(size_t(w.end - w.begin), Cell{});
}

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
