// Where threads wait for each other: barriers, shuffles and votes.
#include <algorithm>

#include "fibres.h"

namespace emu {
namespace {

const char* name(Operation o) {
  return o == Operation::barrier ? "__syncwarp" : o == Operation::exchange ? "a shuffle" : "a vote";
}

void wait(State state) {
  self->state = state;
  to_scheduler(false);
}

// Puts together what a warp, or every warp of a stretch of whole blocks, has logged.
void flush_warp(Fibre* lanes, unsigned count) {
  Log* logs[32] = {};
  for (unsigned l = 0; l < count; ++l) logs[l] = &lanes[l].log;
  trace_flush(logs);
}
}  // namespace

void flush_threads(unsigned first, unsigned threads) {
  for (unsigned t = first; t < first + threads;) {
    const Fibre& f = fibres[t];
    const unsigned count = std::min(32u, f.block->threads - f.thread);
    flush_warp(&fibres[t], count);
    t += count;
  }
}

namespace {

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

}  // namespace

void leave_all() {
  leave(*self->block, kBlockBarrier, "block");
  leave(*self->block->cluster, kClusterBarrier, "cluster");
  leave(cohort, kGridBarrier, "grid");
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

}  // namespace emu
