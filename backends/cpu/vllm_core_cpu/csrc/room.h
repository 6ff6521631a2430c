// Memory that kernels compute in.
#pragma once

#include <cstdint>
#include <cstdlib>

namespace VC_ISA {

// Room that grows and is kept. Not std::vector: the linker may take a function that was compiled for
// one instruction set into the kernels of another.
template <class T>
struct Room {
  T* data = nullptr;
  int64_t size = 0;

  Room() = default;
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;
  ~Room() { std::free(data); }

  // For `count`; what is in it is lost.
  T* fit(int64_t count) {
    if (count <= size) return data;
    std::free(data);
    data = static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 63) / 64 * 64));
    if (!data) std::abort();
    size = count;
    return data;
  }
};

}  // namespace VC_ISA
