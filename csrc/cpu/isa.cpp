// The choice of instruction set, and the ops that tell and change it.
#include "cpu/isa.h"

#include <torch/csrc/stable/library.h>

#include <atomic>
#include <cstdlib>
#include <string>

namespace fastdit {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

Isa best() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return Isa::avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c"))
    return Isa::avx2;
#endif
  return Isa::baseline;
}

// The instruction set of that name, if this machine has it; "" is the best.
Isa named(const std::string& name) {
  if (name.empty()) return best();
  for (int i = 0; i <= int(best()); ++i)
    if (name == kNames[i]) return Isa(i);
  STD_TORCH_CHECK(false, "FASTDIT_CPU_ISA: got ", name,
                  ", allowed are baseline, avx2 and avx512 where the machine has them");
}

std::atomic<Isa>& chosen() {
  static std::atomic<Isa> isa = [] {
    const char* name = std::getenv("FASTDIT_CPU_ISA");
    return named(name ? name : "");
  }();
  return isa;
}

std::string cpu_isa() { return kNames[int(current_isa())]; }
void set_cpu_isa(std::string name) { chosen() = named(name); }

}  // namespace

Isa current_isa() { return chosen().load(std::memory_order_relaxed); }

}  // namespace fastdit

STABLE_TORCH_LIBRARY_FRAGMENT(fastdit_native, m) {
  m.def("cpu_isa() -> str");
  m.def("set_cpu_isa(str name) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastdit_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&fastdit::cpu_isa));
  m.impl("set_cpu_isa", TORCH_BOX(&fastdit::set_cpu_isa));
}
