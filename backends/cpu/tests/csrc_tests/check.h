// What a test program of kernels needs: the kernels of one instruction set, numbers, guarded memory.
//
//   int main(int count, char** arguments) { return vc_test::run(count, arguments, [] { ... }); }
//
// The program's argument is the instruction set, and "few" where an emulator runs it; it exits with
// 0, with 1 after saying what differs, or with 77 where the processor or the build lacks the set.
#pragma once

#include <sys/mman.h>

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "kernels.h"
#include "parallel.h"

extern "C" {
const char* vc_isa(int index, int* usable);
const vc::Kernels* vc_kernels(const char* name);
void vc_set_threads(int threads);
}

namespace vc_test {

inline const vc::Kernels* kernels = nullptr;
inline bool few = false;  // be quick: an emulator is fifty times slower
inline long checks = 0, failures = 0;

// Counts a check; the first twenty that fail are told.
__attribute__((format(printf, 2, 3))) inline void check(bool holds, const char* text, ...) {
  checks++;
  if (holds || ++failures > 20) return;
  std::va_list values;
  va_start(values, text);
  std::vprintf(text, values);
  std::printf("\n");
  va_end(values);
}

// ---- numbers
typedef uint16_t bf16;
inline float widen(float x) { return x; }
inline float widen(bf16 x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
// To the nearest, ties to even.
template <class T>
T narrow(float x);
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline bf16 narrow<bf16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return static_cast<bf16>(bits >> 16 | 0x40);
  return static_cast<bf16>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
template <class T>
constexpr int32_t dtype_of() {
  return sizeof(T) == 4 ? vc::FLOAT32 : vc::BFLOAT16;
}
// Half the distance of neighbours, relative, of 24 or 8 significant bits: what one rounding may cost.
template <class T>
constexpr double unit() {
  return sizeof(T) == 4 ? 1.0 / (1 << 24) : 1.0 / (1 << 8);
}

// The same numbers in every run: about a normal distribution of variance 1.
struct Random {
  uint64_t state;
  explicit Random(uint64_t seed) : state(seed * 0x9e3779b97f4a7c15ull + 1) {}
  uint32_t bits() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(state >> 32);
  }
  int below(int limit) { return static_cast<int>(bits() % static_cast<uint32_t>(limit)); }
  float normal() {
    double sum = 0;
    for (int i = 0; i < 4; i++) sum += bits() / 4294967296.0 - 0.5;
    return static_cast<float>(sum * std::sqrt(3.0));
  }
};

// ---- memory
// An array that ends where no memory follows: a kernel that reads or writes behind it crashes.
template <class T>
class Guarded {
 public:
  explicit Guarded(int64_t count, T fill = T()) : count_(count) {
    const size_t page = 65536;  // the largest page of a 64-bit Arm
    size_t bytes = static_cast<size_t>(count) * sizeof(T);
    size_ = (bytes + page - 1) / page * page + page;
    base_ = static_cast<char*>(
        mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + size_ - page, page, PROT_NONE)) std::abort();
    data_ = reinterpret_cast<T*>(base_ + size_ - page - bytes);
    for (int64_t i = 0; i < count; i++) data_[i] = fill;
  }
  ~Guarded() { munmap(base_, size_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  int64_t size() const { return count_; }

 private:
  int64_t count_;
  size_t size_;
  char* base_;
  T* data_;
};

// ---- threads
// work() on one thread, then on three.
template <class Work>
void with_teams(const Work& work) {
  for (int threads : {1, 3}) {
    vc_set_threads(threads);
    work();
  }
}

template <class Work>
int run(int count, char** arguments, const Work& work) {
  if (count < 2) {
    std::printf("usage: %s INSTRUCTION_SET [few]\n", arguments[0]);
    return 2;
  }
  few = count > 2;
  kernels = vc_kernels(arguments[1]);
  if (!kernels) {
    std::printf("%s does not run here\n", arguments[1]);
    return 77;
  }
  work();
  std::printf("%s: %ld checks, %ld failed\n", arguments[1], checks, failures);
  return failures || !checks ? 1 : 0;
}

}  // namespace vc_test
