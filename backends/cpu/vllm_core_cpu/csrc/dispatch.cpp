// The C interface: which instruction sets there are, the kernels of one, the layout of the structs.
//
// Compiled without any instruction set's flags; VC_HAS_<name> says which the build contains, and
// layout.inc comes from kernels.h (hatch_build.py).
//
// Knows: processors. Does not know: what kernels compute, Python.
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "parallel.h"
#include "pool.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

#define VC_PUBLIC extern "C" __attribute__((visibility("default")))
#define VC_DECLARE(isa)             \
  namespace isa {                   \
  extern const vc::Kernels kernels; \
  }

namespace vc {
int team_threads = 1;

void post(uint32_t count, Run run, const void* context) {
  if (team_threads > 1 && the_pool()->post(count, run, context)) return;
  for (uint32_t index = 0; index < count; index++) run(static_cast<int>(index), context);
}
}

VC_DECLARE(generic)
VC_DECLARE(avx2)
VC_DECLARE(avx512)
VC_DECLARE(avx512_bf16)
VC_DECLARE(neon_bf16)

namespace {

#if defined(__x86_64__)
// By hand: what __builtin_cpu_supports needs is not in every compiler's run-time library.
struct Processor {
  bool avx2 = false, avx512 = false, avx512_bf16 = false;
  Processor() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return;  // OSXSAVE
    unsigned saved, high;  // registers that the system saves
    __asm__ volatile("xgetbv" : "=a"(saved), "=d"(high) : "c"(0));
    bool fma_f16c_avx = (c >> 12 & 1) && (c >> 29 & 1) && (c >> 28 & 1);
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
    avx2 = fma_f16c_avx && (b >> 5 & 1) && (saved & 0x06) == 0x06;
    bool f_dq_bw_vl = (b >> 16 & 1) && (b >> 17 & 1) && (b >> 30 & 1) && (b >> 31 & 1);
    avx512 = avx2 && f_dq_bw_vl && (c >> 11 & 1) && (saved & 0xe6) == 0xe6;  // and VNNI
    avx512_bf16 = avx512 && a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 5 & 1);
  }
};
#elif defined(__aarch64__)
struct Processor {
  // HWCAP_ASIMDDP; HWCAP2_I8MM and HWCAP2_BF16: young headers only have the names
  bool neon_bf16 = (getauxval(AT_HWCAP) >> 20 & 1) && (getauxval(AT_HWCAP2) >> 13 & 3) == 3;
};
#else
struct Processor {};
#endif

struct Candidate {
  const vc::Kernels* kernels;
  bool usable;
};

// Candidate `index`, the best first; false behind the last. The generic one is plain C++ and, on
// Arm, NEON, which every 64-bit Arm has.
bool candidate(int index, Candidate* out) {
  const Processor has;
  (void)has;
  const Candidate found[] = {
#if defined(VC_HAS_avx512_bf16)
      {&avx512_bf16::kernels, has.avx512_bf16},
#endif
#if defined(VC_HAS_avx512)
      {&avx512::kernels, has.avx512},
#endif
#if defined(VC_HAS_avx2)
      {&avx2::kernels, has.avx2},
#endif
#if defined(VC_HAS_neon_bf16)
      {&neon_bf16::kernels, has.neon_bf16},
#endif
      {&generic::kernels, true},
  };
  if (index < 0 || index >= static_cast<int>(sizeof(found) / sizeof(found[0]))) return false;
  *out = found[index];
  return true;
}

// A struct (offset 0, its size) or one of its fields.
struct Row {
  const char* name;
  const char* kind;  // p pointer, i int32, l int64, f float, s struct; functions as l(ppi)
  int64_t offset, size;
};
#define VC_SIZE(type) {#type, "s", 0, sizeof(vc::type)},
#define VC_FIELD(type, field, kind) \
  {#type "." #field, kind, offsetof(vc::type, field), sizeof(vc::type::field)},
const Row layout[] = {
#include "layout.inc"
    {nullptr, nullptr, 0, 0},
};

}  // namespace

// Name of candidate `index`, best first; null behind the last. usable: whether this processor runs it.
VC_PUBLIC const char* vc_isa(int index, int* usable) {
  Candidate found;
  if (!candidate(index, &found)) return nullptr;
  *usable = found.usable;
  return found.kernels->name;
}

// The kernels of that name (null: the best); null when this processor cannot run them.
VC_PUBLIC const vc::Kernels* vc_kernels(const char* name) {
  Candidate found;
  for (int i = 0; candidate(i, &found); i++)
    if (found.usable && (!name || !std::strcmp(name, found.kernels->name))) return found.kernels;
  return nullptr;
}

// How many threads may work, the caller's among them.
VC_PUBLIC void vc_set_threads(int threads) {
  vc::team_threads = threads < 1 ? 1 : threads;
  vc::the_pool()->resize(vc::team_threads);
}

// The structs as they were compiled; the last row has no name.
VC_PUBLIC const Row* vc_layout() { return layout; }

// Names sources, compiler and flags (hatch_build.py looks for it in the file).
VC_PUBLIC const char* vc_build() { return VC_BUILD; }
