// Working memory of a kernel call. Not std::vector: its functions would have external linkage (see
// level.h).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <new>

namespace embattle {
namespace {

// `count` uninitialised numbers; none take no time.
template <class T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(count == 0
                  ? nullptr
                  : static_cast<T*>(::operator new(static_cast<size_t>(count) * sizeof(T)))) {}
  ~Scratch() { ::operator delete(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  T* get() { return data_; }
  const T* get() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_;
};

}  // namespace
}  // namespace embattle
