#include "table.h"

#include <cstring>

namespace fastdiff {

#if defined(FASTDIFF_X86_VARIANTS)
namespace avx512 {
extern const Table table;
}
namespace avx2 {
extern const Table table;
}
#endif
namespace baseline {
extern const Table table;
}

namespace {

const Variant kVariants[] = {
#if defined(FASTDIFF_X86_VARIANTS)
    // These ask the operating system too, whether it keeps the registers.
    {"avx512", &avx512::table,
     [] {
       return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
     }},
    {"avx2", &avx2::table,
     [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }},
#endif
    {"baseline", &baseline::table, [] { return true; }},
};

const Variant* best() {
  const Variant* variant = kVariants;
  while (!variant->supported()) ++variant;
  return variant;
}

const Variant* current = best();

}  // namespace

const Variant* variants(int& count) {
  count = int(sizeof(kVariants) / sizeof(kVariants[0]));
  return kVariants;
}

const Variant& chosen() { return *current; }

bool choose(const char* name) {
  for (const Variant& variant : kVariants) {
    if (std::strcmp(variant.name, name) == 0 && variant.supported()) {
      current = &variant;
      return true;
    }
  }
  return false;
}

}  // namespace fastdiff
