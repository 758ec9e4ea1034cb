// Adding partial sums, and float rows from and to their storage type.
#include "cpu/reduce.h"

#include "cpu/isa/modulation.h"

namespace fastdit::FASTDIT_ISA {

FLATTEN void sum_partials(const Partials& p, int64_t width, float* to) {
  sweep<1>(width, [&](int64_t d, auto part, int) {
    Vec sum = {};
    for (int64_t i = 0; i < p.count; ++i) sum += load(p.data + i * p.stride + d, part);
    store(to + d, sum, part);
  });
}

void store_floats(const float* from, int64_t width, void* to, int64_t row, Type type) {
  store_row(from, width, to, row, type);
}

void load_floats(const Modulation& from, int64_t b, int64_t width, float* to) {
  converted(from, b * from.batch, width, to);
}

}  // namespace fastdit::FASTDIT_ISA
