// Working memory of a kernel call. Not std::vector: its functions would have external linkage (see
// level.h).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <new>

namespace embattle {
namespace {

// `count` uninitialised numbers, where vectors do not cross lines of the cache; none take no time.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(count == 0 ? nullptr : static_cast<T*>(::operator new(bytes(count), kLine))) {}
  ~Scratch() { ::operator delete(data_, kLine); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* get() { return data_; }
  const T* get() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  static constexpr std::align_val_t kLine{64};
  static size_t bytes(int64_t count) { return static_cast<size_t>(count) * sizeof(T); }
  T* data_;
};

}  // namespace
}  // namespace embattle
