#include "trace.h"

#include <link.h>
#include <pthread.h>

#include <algorithm>
#include <map>
#include <string>
#include <unordered_map>
#include <unordered_set>

#include "emulator.h"

namespace emu {
namespace {

constexpr uint64_t kSector = 32, kBank = 4, kBanks = 32;

// What requests of one kind cost. `units`: sectors or wavefronts; `ideal`: what the same bytes
// would need side by side.
struct Cost {
  uint64_t requests = 0, bytes = 0, units = 0, ideal = 0;
  uint64_t wide = 0;  // requests of 16 bytes a lane
  void add(bool w, uint64_t b, uint64_t u, uint64_t i) {
    ++requests;
    wide += w;
    bytes += b;
    units += u;
    ideal += i;
  }
};

struct Record {
  uint64_t kernel = 0, grid = 0, threads = 0, cluster = 0, shared = 0, cooperative = 0;
  uint64_t cohorts = 0, ran = 0, blocks_ran = 0, memset_bytes = 0;
  Cost read, write, shared_read, shared_write;
  uint64_t copied = 0;                       // bytes, asynchronously
  uint64_t waited = 0;                       // the most of them that a thread waited for at once
  uint64_t first_read = 0, first_write = 0;  // sectors that no request of the launch had touched
  uint64_t atomics = 0;
  uint64_t events[4] = {};
  std::map<uint64_t, Cost> places[2];  // by space and instruction
};

bool on = false;
uint64_t most = 0;
std::vector<Record> records;
Record now;
std::unordered_set<uint64_t> seen_read, seen_written;
std::string told;

struct Range {
  uintptr_t begin = 0, end = 0;
  bool contains(const void* p) const {
    const auto at = reinterpret_cast<uintptr_t>(p);
    return at >= begin && at < end;
  }
};

// The program (or library) that this is part of.
const Range& image() {
  static const Range range = [] {
    Range found;
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* out) {
          Range r{UINTPTR_MAX, 0};
          for (int i = 0; i < info->dlpi_phnum; ++i) {
            const auto& segment = info->dlpi_phdr[i];
            if (segment.p_type != PT_LOAD) continue;
            r.begin = std::min<uintptr_t>(r.begin, info->dlpi_addr + segment.p_vaddr);
            r.end = std::max<uintptr_t>(r.end, info->dlpi_addr + segment.p_vaddr + segment.p_memsz);
          }
          if (!r.contains(&on)) return 0;
          *static_cast<Range*>(out) = r;
          return 1;
        },
        &found);
    return found;
  }();
  return range;
}

Range host_stack() {
  pthread_attr_t attributes;
  void* begin = nullptr;
  size_t size = 0;
  if (pthread_getattr_np(pthread_self(), &attributes) == 0) {
    pthread_attr_getstack(&attributes, &begin, &size);
    pthread_attr_destroy(&attributes);
  }
  return {reinterpret_cast<uintptr_t>(begin), reinterpret_cast<uintptr_t>(begin) + size};
}

uint64_t ceil_div(uint64_t a, uint64_t b) { return (a + b - 1) / b; }

struct Lane {
  uint64_t at, size;
};

// How many different multiples of `unit` the lanes touch; they are left in `units`, sorted.
void touched(const Lane* lanes, size_t n, uint64_t unit, std::vector<uint64_t>& units) {
  units.clear();
  for (size_t i = 0; i < n; ++i)
    for (uint64_t u = lanes[i].at / unit; u <= (lanes[i].at + lanes[i].size - 1) / unit; ++u)
      units.push_back(u);
  std::sort(units.begin(), units.end());
  units.erase(std::unique(units.begin(), units.end()), units.end());
}

// Different bytes, in units of the accesses' size: they are aligned to it.
uint64_t different_bytes(const Lane* lanes, size_t n, std::vector<uint64_t>& scratch) {
  scratch.clear();
  for (size_t i = 0; i < n; ++i) scratch.push_back(lanes[i].at);
  std::sort(scratch.begin(), scratch.end());
  const auto last = std::unique(scratch.begin(), scratch.end());
  return uint64_t(last - scratch.begin()) * lanes[0].size;
}

void global_request(const Logged& what, const Lane* lanes, size_t n) {
  static std::vector<uint64_t> units;
  const uint64_t bytes = different_bytes(lanes, n, units);
  touched(lanes, n, kSector, units);
  const bool write = what.kind == Kind::write;
  auto& seen = write ? seen_written : seen_read;
  uint64_t& first = write ? now.first_write : now.first_read;
  for (uint64_t u : units) first += seen.insert(u).second;
  (write ? now.write : now.read)
      .add(what.size == 16, bytes, units.size(), ceil_div(bytes, kSector));
  now.places[0][what.place].add(what.size == 16, bytes, units.size(), ceil_div(bytes, kSector));
}

// Lanes are served so many at a time that their accesses have 128 bytes; those that hit different
// words of one bank wait for each other. Other blocks' memory (of a cluster) counts as if it were
// the block's own.
void shared_request(const Logged& what, const Lane* lanes, const unsigned* numbers, size_t n) {
  static std::vector<uint64_t> words;
  const unsigned together = what.size <= 4 ? 32 : what.size <= 8 ? 16 : 8;
  uint64_t waves = 0, least = 0;
  for (size_t begin = 0; begin < n;) {
    size_t end = begin;
    while (end < n && numbers[end] / together == numbers[begin] / together) ++end;
    touched(lanes + begin, end - begin, kBank, words);
    uint64_t in_bank[kBanks] = {}, worst = 0;
    for (uint64_t w : words) worst = std::max(worst, ++in_bank[w % kBanks]);
    waves += worst;
    ++least;
    begin = end;
  }
  const uint64_t bytes = different_bytes(lanes, n, words);
  const uint64_t ideal = std::max(least, ceil_div(bytes, kBank * kBanks));
  (what.kind == Kind::read ? now.shared_read : now.shared_write)
      .add(what.size == 16, bytes, waves, ideal);
  now.places[1][what.place].add(what.size == 16, bytes, waves, ideal);
}

void request(const Logged& what, const Lane* lanes, const unsigned* numbers, size_t n) {
  if (what.kind == Kind::atomic) {
    now.atomics += n;
    return;
  }
  if (what.kind == Kind::copy) now.copied += n * what.size;
  if (what.space == Space::global)
    global_request(what, lanes, n);
  else
    shared_request(what, lanes, numbers, n);
}

void tell(std::string& out, const char* name, uint64_t value) {
  out += std::string(out.back() == '{' || out.back() == '[' ? "" : ",") + "\"" + name +
         "\":" + std::to_string(value);
}
void tell(std::string& out, const char* name, const Cost& c) {
  out += std::string(",\"") + name + "\":{";
  tell(out, "requests", c.requests);
  tell(out, "bytes", c.bytes);
  tell(out, "units", c.units);
  tell(out, "ideal", c.ideal);
  tell(out, "wide", c.wide);
  out += '}';
}

}  // namespace

bool tracing() { return on; }
uint64_t trace_most() { return on ? most : 0; }
bool trace_ignores(const void* p) {
  static const Range stack = host_stack();
  return image().contains(p) || stack.contains(p);
}

void trace_launch(const Launch& l, uint64_t cohorts, uint64_t ran, uint64_t blocks_ran) {
  now.kernel = reinterpret_cast<uintptr_t>(l.kernel) - image().begin;
  now.grid = uint64_t(l.grid.x) * l.grid.y * l.grid.z;
  now.threads = uint64_t(l.block.x) * l.block.y * l.block.z;
  now.cluster = uint64_t(l.cluster.x) * l.cluster.y * l.cluster.z;
  now.shared = l.dynamic_shared;
  now.cooperative = l.cooperative;
  now.cohorts = cohorts;
  now.ran = ran;
  now.blocks_ran = blocks_ran;
  records.push_back(std::move(now));
  now = Record{};
  seen_read.clear();
  seen_written.clear();
}

void trace_memset(size_t bytes) {
  if (!on) return;
  records.emplace_back();
  records.back().memset_bytes = bytes;
}

void trace_wait(size_t bytes) { now.waited = std::max<uint64_t>(now.waited, bytes); }

void trace_event(Event event, unsigned times) { now.events[int(event)] += times; }

void trace_access(Log& log, uint64_t chain, const void* at, size_t size, Space space, Kind kind,
                  const void* place) {
  const auto address = reinterpret_cast<uintptr_t>(at);
  const uint64_t where = reinterpret_cast<uintptr_t>(place) - image().begin;
  uint64_t piece = 16;
  while (size % piece || address % piece) piece /= 2;
  for (uint64_t done = 0; done < size; done += piece)
    log.push_back({(chain * 0x9e3779b97f4a7c15u + where) * 64 + done / piece, address + done, where,
                   uint32_t(piece), space, kind});
}

void trace_flush(Log* const (&logs)[32]) {
  size_t longest = 0;
  bool alike = true;
  const Log* first = nullptr;
  for (const Log* log : logs) {
    if (!log || log->empty()) continue;
    if (!first) first = log;
    longest = std::max(longest, log->size());
    alike = alike && log->size() == first->size() &&
            std::equal(log->begin(), log->end(), first->begin(),
                       [](const Logged& a, const Logged& b) { return a.key == b.key; });
  }
  if (!first) return;
  Lane lanes[32];
  unsigned numbers[32];
  if (alike) {
    for (size_t i = 0; i < longest; ++i) {
      size_t n = 0;
      for (unsigned l = 0; l < 32; ++l) {
        if (!logs[l] || logs[l]->empty()) continue;
        numbers[n] = l;
        lanes[n++] = {(*logs[l])[i].at, (*logs[l])[i].size};
      }
      request((*first)[i], lanes, numbers, n);
    }
  } else {
    // By instruction and how often the lane has come to it.
    std::map<std::pair<uint64_t, uint64_t>, std::vector<std::pair<unsigned, const Logged*>>> all;
    for (unsigned l = 0; l < 32; ++l) {
      if (!logs[l]) continue;
      std::unordered_map<uint64_t, uint64_t> times;
      for (const Logged& e : *logs[l]) all[{e.key, times[e.key]++}].push_back({l, &e});
    }
    for (const auto& [key, accesses] : all) {
      size_t n = 0;
      for (const auto& [l, e] : accesses) {
        numbers[n] = l;
        lanes[n++] = {e->at, e->size};
      }
      request(*accesses[0].second, lanes, numbers, n);
    }
  }
  for (Log* log : logs)
    if (log) log->clear();
}

}  // namespace emu

// ---- For Python, by ctypes
// ------------------------------------------------------------------------

#define EMU_EXPORT extern "C" __attribute__((visibility("default")))

// Counts from now on, or no longer. `cohorts`: how many of each launch are to run; 0: all.
EMU_EXPORT void emu_trace(int trace, uint64_t cohorts) {
  emu::on = trace;
  emu::most = cohorts;
  emu::now = {};
  emu::records.clear();
  emu::seen_read.clear();
  emu::seen_written.clear();
}

// How many registers a thread of any kernel has from now on.
EMU_EXPORT void emu_registers(int registers) { emu::device().registers = registers; }

// The launches since the last call, as JSON that stays until the next one. Kernels and instructions
// are offsets in the program.
EMU_EXPORT const char* emu_trace_take() {
  using namespace emu;
  std::string& out = told = "[";
  for (const Record& r : records) {
    out += out.back() == '[' ? "{" : ",{";
    tell(out, "kernel", r.kernel);
    tell(out, "grid", r.grid);
    tell(out, "threads", r.threads);
    tell(out, "cluster", r.cluster);
    tell(out, "shared", r.shared);
    tell(out, "cooperative", r.cooperative);
    tell(out, "cohorts", r.cohorts);
    tell(out, "ran", r.ran);
    tell(out, "blocks_ran", r.blocks_ran);
    tell(out, "memset_bytes", r.memset_bytes);
    tell(out, "copied", r.copied);
    tell(out, "waited", r.waited);
    tell(out, "first_read", r.first_read);
    tell(out, "first_write", r.first_write);
    tell(out, "atomics", r.atomics);
    tell(out, "block_barriers", r.events[0]);
    tell(out, "warp_operation_lanes", r.events[1]);
    tell(out, "cluster_barriers", r.events[2]);
    tell(out, "grid_barriers", r.events[3]);
    tell(out, "read", r.read);
    tell(out, "write", r.write);
    tell(out, "shared_read", r.shared_read);
    tell(out, "shared_write", r.shared_write);
    for (int space = 0; space < 2; ++space) {
      out += space ? ",\"shared_places\":{" : ",\"global_places\":{";
      bool more = false;
      for (const auto& [place, cost] : r.places[space]) {
        out += std::string(more ? "," : "") + "\"" + std::to_string(place) + "\":[" +
               std::to_string(cost.requests) + "," + std::to_string(cost.units) + "," +
               std::to_string(cost.ideal) + "]";
        more = true;
      }
      out += '}';
    }
    out += '}';
  }
  out += ']';
  records.clear();
  return out.c_str();
}
