// What becomes of a tile of sums: bias, GELU, gate and residual, straight from the first-level cache.
#pragma once

#include "cpu/isa/gelu.h"
#include "cpu/isa/gemm.h"

namespace fastdit::FASTDIT_ISA {

// Asks for the lines of C that a tile will write, before its product: 2 to 4 percent of the whole.
INLINE void fetch_result(const Gemm& g, int64_t first, int64_t rows, int64_t column) {
  for (int64_t r = first; r < first + rows; ++r)
    for (int d = 0; d < kPanel; d += 16)
      __builtin_prefetch(g.c + r * g.c_stride + column + d, 1);
}

template <Epilogue kind>
INLINE void finish_rows(const Gemm& g, int64_t first, int64_t rows, int64_t column,
                        const float* tile) {
  for (int64_t r = first; r < first + rows; ++r, tile += kPanel) {
    float* c = g.c + r * g.c_stride + column;
    const float* row = nullptr;
    if constexpr (kind == Epilogue::gate) row = g.row + r / g.tokens * g.row_step + column;
    if constexpr (kind == Epilogue::add) row = g.row + r % g.tokens * g.row_step + column;
#pragma GCC unroll 2
    for (int d = 0; d < kPanel; d += L) {
      Vec v = load(tile + d, Full{});
      if (g.bias) v += load(g.bias + column + d, Full{});
      if constexpr (kind == Epilogue::gelu) v = gelu<false>(v);
      if constexpr (kind == Epilogue::gate)
        v = muladd(load(row + d, Full{}), v, load(c + d, Full{}));
      if constexpr (kind == Epilogue::add) v += load(row + d, Full{});
      store(c + d, v, Full{});
    }
  }
}

INLINE void finish(const Gemm& g, int64_t first, int64_t rows, int64_t column, const float* tile) {
  switch (g.epilogue) {
    case Epilogue::plain: return finish_rows<Epilogue::plain>(g, first, rows, column, tile);
    case Epilogue::gelu: return finish_rows<Epilogue::gelu>(g, first, rows, column, tile);
    case Epilogue::gate: return finish_rows<Epilogue::gate>(g, first, rows, column, tile);
    case Epilogue::add: return finish_rows<Epilogue::add>(g, first, rows, column, tile);
  }
}

}  // namespace fastdit::FASTDIT_ISA
