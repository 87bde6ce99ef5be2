// Gathering the rows of a batch that belong together: a stable sort of (key, position), and runs of
// equal keys.
#pragma once

#include "scratch.h"
#include "spread.h"

namespace embattle {
namespace {

struct Keyed {
  int64_t key;
  int64_t position;
};

// Sorts items[0, n) by key, equal keys by position, and returns where the result is: in items or
// in spare, which is as long. Preconditions: 0 <= key <= largest; positions ascend.
inline Keyed* sort_by_key(Keyed* items, Keyed* spare, int64_t n, int64_t largest) {
  constexpr int kBits = 11;
  constexpr int64_t kDigits = int64_t(1) << kBits;
  if (n <= 48) {
    for (int64_t i = 1; i < n; ++i) {
      const Keyed item = items[i];
      int64_t j = i;
      for (; j > 0 && items[j - 1].key > item.key; --j) items[j] = items[j - 1];
      items[j] = item;
    }
    return items;
  }
  for (int shift = 0; shift < 63 && (largest >> shift) > 0; shift += kBits) {
    int64_t starts[kDigits] = {};
    for (int64_t i = 0; i < n; ++i) ++starts[(items[i].key >> shift) & (kDigits - 1)];
    int64_t next = 0;
    for (int64_t d = 0; d < kDigits; ++d) {
      const int64_t count = starts[d];
      starts[d] = next;
      next += count;
    }
    for (int64_t i = 0; i < n; ++i)
      spare[starts[(items[i].key >> shift) & (kDigits - 1)]++] = items[i];
    Keyed* const sorted = spare;
    spare = items;
    items = sorted;
  }
  return items;
}

// The positions of every key that occurs, keys and positions ascending. Negative keys are left
// out.
class Runs {
 public:
  // Precondition: keys < rows.
  Runs(const int64_t* keys, int64_t n, int64_t rows) : items_(n), spare_(n), starts_(n + 1) {
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i)
      if (keys[i] >= 0) items_[kept++] = {keys[i], i};
    sorted_ = sort_by_key(items_.get(), spare_.get(), kept, rows > 0 ? rows - 1 : 0);
    for (int64_t i = 0; i < kept; ++i)
      if (i == 0 || sorted_[i].key != sorted_[i - 1].key) starts_[count_++] = i;
    starts_[count_] = kept;
  }

  int64_t count() const { return count_; }
  int64_t key(int64_t run) const { return sorted_[starts_[run]].key; }
  int64_t begin(int64_t run) const { return starts_[run]; }
  int64_t end(int64_t run) const { return starts_[run + 1]; }
  int64_t position(int64_t item) const { return sorted_[item].position; }

 private:
  Scratch<Keyed> items_, spare_;
  Scratch<int64_t> starts_;
  const Keyed* sorted_ = nullptr;
  int64_t count_ = 0;
};

}  // namespace
}  // namespace embattle
