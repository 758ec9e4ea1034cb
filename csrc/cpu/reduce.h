// Sums over rows that do not depend on the number of threads: rows are divided into chunks by
// their shape alone, each chunk leaves partial sums, and these are added in order.
#pragma once

#include "cpu/isa.h"

namespace fastdit {

constexpr int64_t kChunk = 32;  // rows: their partial sums are 3 % of the bytes that a backward moves

inline int64_t chunks_of(int64_t rows) { return (rows + kChunk - 1) / kChunk; }

// `count` rows of `width` floats, `stride` apart.
struct Partials {
  const float* data = nullptr;
  int64_t count = 0, stride = 0;
};

}  // namespace fastdit

// to = the sum of the partial rows, added in order.
FASTDIT_KERNEL(sum_partials, (const Partials& p, int64_t width, float* to), (p, width, to))
// Row `row` of the dense tensor `to` gets `width` floats, rounded to its type.
FASTDIT_KERNEL(store_floats, (const float* from, int64_t width, void* to, int64_t row, Type type),
               (from, width, to, row, type))
// The modulation of sample b as floats.
FASTDIT_KERNEL(load_floats, (const Modulation& from, int64_t b, int64_t width, float* to),
               (from, b, width, to))
