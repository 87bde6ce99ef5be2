// Gathering the rows of a batch that belong together: a stable sort of keys, and runs of equal
// ones.
#pragma once

#include "../launch.h"
#include "scratch.h"

namespace embattle {
namespace {

// The number of bits that numbers below `end` need.
inline int bits_below(int64_t end) {
  int bits = 0;
  while (bits < 63 && (int64_t(1) << bits) < end) ++bits;
  return bits;
}

// The positions of every key that occurs, keys and positions ascending. Negative keys and the
// padding are left out.
class Runs {
 public:
  // Precondition: keys < rows. A key and a position share 64 bits, which is enough for any table
  // and batch that fit in a machine's memory.
  Runs(const int64_t* keys, int64_t n, int64_t rows, int64_t padding = -1)
      : items_(n), spare_(n), starts_(n + 1), shift_(bits_below(n)), key_bits_(bits_below(rows)) {
    int64_t kept = 0;
    for (int64_t i = 0; i < n; ++i) {
      items_[kept] = (static_cast<uint64_t>(keys[i]) << shift_) | static_cast<uint64_t>(i);
      kept += keys[i] >= 0 && keys[i] != padding;
    }
    sorted_ = sorted(kept);
    uint64_t before = ~uint64_t(0);
    for (int64_t i = 0; i < kept; ++i) {
      const uint64_t key = sorted_[i] >> shift_;
      starts_[count_] = i;
      count_ += key != before;
      before = key;
    }
    starts_[count_] = kept;
  }

  int64_t count() const { return count_; }
  int64_t key(int64_t run) const { return static_cast<int64_t>(sorted_[starts_[run]] >> shift_); }
  int64_t begin(int64_t run) const { return starts_[run]; }
  int64_t end(int64_t run) const { return starts_[run + 1]; }
  int64_t position(int64_t item) const {
    return static_cast<int64_t>(sorted_[item] & ((uint64_t(1) << shift_) - 1));
  }
  int64_t items() const { return starts_[count_]; }

  // The first run that begins at the item or after it.
  int64_t first_from(int64_t item) const {
    int64_t low = 0, high = count_;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (starts_[middle] < item)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  }

 private:
  // Sorts the first n items, whose positions ascend, by key, and returns where the result is.
  const uint64_t* sorted(int64_t n) {
    uint64_t* items = items_.get();
    uint64_t* spare = spare_.get();
    if (n <= 48) {
      for (int64_t i = 1; i < n; ++i) {
        const uint64_t item = items[i];
        int64_t j = i;
        for (; j > 0 && items[j - 1] > item; --j) items[j] = items[j - 1];
        items[j] = item;
      }
      return items;
    }
    constexpr int kLargest = 10;  // bits of a digit
    const int digits = (key_bits_ + kLargest - 1) / kLargest;
    const int width = digits > 0 ? (key_bits_ + digits - 1) / digits : 0;
    const uint64_t mask = (uint64_t(1) << width) - 1;
    int64_t starts[1 << kLargest];
    for (int digit = 0; digit < digits; ++digit) {
      const int shift = shift_ + digit * width;
      for (uint64_t value = 0; value <= mask; ++value) starts[value] = 0;
      for (int64_t i = 0; i < n; ++i) ++starts[(items[i] >> shift) & mask];
      int64_t next = 0;
      for (uint64_t value = 0; value <= mask; ++value) {
        const int64_t count = starts[value];
        starts[value] = next;
        next += count;
      }
      for (int64_t i = 0; i < n; ++i) spare[starts[(items[i] >> shift) & mask]++] = items[i];
      uint64_t* const result = spare;
      spare = items;
      items = result;
    }
    return items;
  }

  Scratch<uint64_t> items_, spare_;
  Scratch<int64_t> starts_;
  int shift_, key_bits_;
  const uint64_t* sorted_ = nullptr;
  int64_t count_ = 0;
};

}  // namespace
}  // namespace embattle
