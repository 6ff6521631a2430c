// How fast memory can be read: a buffer larger than any cache, summed by some threads.
// argv: GiB, threads, seconds. Prints the median of the passes in GB/s.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include <sys/mman.h>

typedef int64_t Lanes __attribute__((vector_size(64)));

static int64_t sum(const Lanes* p, size_t n) {
  Lanes a{}, b{}, c{}, d{};
  for (size_t i = 0; i + 4 <= n; i += 4) {
    __builtin_prefetch(p + i + 64);
    __builtin_prefetch(p + i + 65);
    __builtin_prefetch(p + i + 66);
    __builtin_prefetch(p + i + 67);
    a += p[i], b += p[i + 1], c += p[i + 2], d += p[i + 3];
  }
  a += b + c + d;
  int64_t total = 0;
  for (int i = 0; i < 8; i++) total += a[i];
  return total;
}

int main(int argc, char** argv) {
  const size_t bytes = static_cast<size_t>(std::atof(argv[1]) * (1 << 30)) & ~size_t((2 << 20) - 1);
  const int threads = std::atoi(argv[2]);
  const double seconds = std::atof(argv[3]);
  void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  madvise(at, bytes, MADV_HUGEPAGE);
  Lanes* p = static_cast<Lanes*>(at);
  const size_t n = bytes / sizeof(Lanes), part = n / threads;
  for (size_t i = 0; i < n; i++) p[i] = Lanes{} + 1;
  auto now = [] { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); };
  std::vector<double> rates;
  std::vector<int64_t> sums(threads * 8);
  for (double begin = now(); now() - begin < seconds || rates.size() < 3;) {
    double start = now();
    std::vector<std::thread> team;
    for (int t = 0; t < threads; t++) team.emplace_back([&, t] { sums[t * 8] = sum(p + t * part, part); });
    for (auto& member : team) member.join();
    rates.push_back(bytes / (now() - start) / 1e9);
  }
  std::sort(rates.begin(), rates.end());
  std::printf("%.2f %lld\n", rates[rates.size() / 2], static_cast<long long>(sums[0]));
}
