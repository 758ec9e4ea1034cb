// Packing the weights of a DiT for the native forward: once, as panels of the instruction set.
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstring>

#include "cpu/forward_shared.h"

namespace fastdit {
namespace {

// Asks for pages of 2 MB before the first is touched: a forward reads every one of them, and misses
// of the page table took 1 to 5 percent of a product. Where they are not to be had nothing changes.
void use_large_pages(float* memory, int64_t floats) {
#if defined(__linux__)
  constexpr uintptr_t kPage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + kPage - 1) / kPage * kPage;
  const uintptr_t end = reinterpret_cast<uintptr_t>(memory + floats) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void pack(const Linear& l, const Tensor& weight, const Tensor& bias, float* memory) {
  const float* from = floats_of(weight, {l.rows, l.depth}, "weight");
  const int64_t panels = padded(l.rows) / panel();
  const double work = double(l.rows) * l.depth;
  if (l.group) {
    const PackInt8 p{from, l.rows, l.depth, reinterpret_cast<int32_t*>(memory + l.weight),
                     memory + l.scale, reinterpret_cast<int32_t*>(memory + l.sums)};
    shared(panels, work, [&](int64_t begin, int64_t end) { pack_int8_panels(p, begin, end); });
  } else {
    const Pack p{from, l.rows, l.depth, memory + l.weight};
    shared(panels, work, [&](int64_t begin, int64_t end) { pack_panels(p, begin, end); });
  }
  float* to = memory + l.bias;
  std::memcpy(to, floats_of(bias, {l.rows}, "bias"), l.rows * sizeof(float));
  std::fill(to + l.rows, to + padded(l.rows), 0.f);
}

// `parameters`: patch weight (D, K) and bias, positions (N, D), each block's four Linears, the last.
Tensor forward_pack(std::vector<Tensor> parameters, std::vector<int64_t> numbers,
                    bool int8) {
  const Dit d = dit_of(numbers);
  const PackedLayout layout(d, group_of(int8));
  STD_TORCH_CHECK(parameters.size() == 2 * layout.blocks.size() + 5, "parameters: wrong length");
  Tensor packed = empty({layout.floats}, ScalarType::Float);
  float* memory = static_cast<float*>(packed.data_ptr());
  use_large_pages(memory, layout.floats);
  std::fill(memory, memory + 16, float(panel()));
  memory[1] = float(group_of(int8));
  pack(layout.patch, parameters[0], parameters[1], memory);
  const float* bias = floats_of(parameters[1], {d.hidden}, "bias");
  const float* positions = floats_of(parameters[2], {d.tokens(), d.hidden}, "positions");
  for (int64_t n = 0; n < d.tokens(); ++n) {
    float* row = memory + layout.positions + n * padded(d.hidden);
    for (int64_t i = 0; i < d.hidden; ++i) row[i] = positions[n * d.hidden + i] + bias[i];
    std::fill(row + d.hidden, row + padded(d.hidden), 0.f);
  }
  size_t at = 3;
  for (const Linear& l : layout.blocks) pack(l, parameters[at], parameters[at + 1], memory), at += 2;
  pack(layout.last, parameters[at], parameters[at + 1], memory);
  return packed;
}

}  // namespace
}  // namespace fastdit

STABLE_TORCH_LIBRARY_FRAGMENT(fastdit_native, m) {
  m.def("forward_pack(Tensor[] parameters, int[] dit, bool int8) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastdit_native, CPU, m) {
  m.impl("forward_pack", TORCH_BOX(&fastdit::forward_pack));
}
