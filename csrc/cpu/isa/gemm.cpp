// C = epilogue(A·B + bias) with B packed.
//
// B is walked in blocks of kGroup panels and at most kDepth of the depth (300 KB with AVX-512),
// which stay in the second-level cache while all rows pass; a tile of A and its kDepth numbers
// (21 KB) stay in the first while the panels of a group pass. Each element is the sum of its blocks'
// sums: a chain is never longer than kDepth, which is what keeps the error at MKL's.
#include "cpu/isa/epilogue.h"

namespace fastdit::FASTDIT_ISA {
namespace {

constexpr int64_t kDepth = 384, kGroup = 6, kTileFloats = int64_t(kTile) * kPanel;
constexpr int64_t kMostRows = 4096;  // whose partial sums lie in scratch memory

int64_t blocks_of(int64_t depth) { return depth ? (depth + kDepth - 1) / kDepth : 1; }

// Of the next tile of A the lines that one panel of `count` has time for, towards the second-level
// cache: at 14 places at once the hardware sees no stream. A percent or two.
INLINE void fetch_next(const Gemm& g, int64_t row, int64_t rows, int64_t k, int64_t depth,
                       int64_t panel, int64_t count) {
  for (int64_t r = rows * panel / count; r < rows * (panel + 1) / count; ++r)
    for (int64_t i = 0; i < depth; i += 16)
      __builtin_prefetch(g.a + (row + r) * g.a_stride + k + i, 0, 2);
}

// A part of a group of panels that is multiplied at once: `depth` of each from `k` on.
struct Block {
  int64_t k, depth, panel;
};

// Where the panel behind `panels` others of a block begins, and which part of it the rows [first,
// first + rows) of `all` are to ask for: the whole is there before its turn. It matters where few rows
// pass: 3 percent with 128 of XL/2.
INLINE Ahead fetch_block(const Gemm& g, const Block& b, int64_t panels, int64_t first, int64_t rows,
                         int64_t all, int64_t depth) {
  const int64_t size = b.depth * kPanel * int64_t(sizeof(float));
  const int64_t begin = size * first / all, end = size * (first + rows) / all;
  const float* panel = g.b + ((b.panel + panels) * g.depth + b.k) * kPanel;
  return {reinterpret_cast<const char*>(panel) + begin, (end - begin + depth - 1) / depth};
}

// One group of panels, all blocks of the depth, rows [row, row_end). Behind the last group lies another
// Linear, or nothing that is read.
void group_product(const Gemm& g, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end,
                   Beside& beside, float* scratch) {
  const int64_t blocks = blocks_of(g.depth);
  const auto begin = [&](int64_t block) { return g.depth * block / blocks; };
  for (int64_t block = 0; block < blocks; ++block) {
    const bool last = block == blocks - 1;
    const int64_t k = begin(block), depth = begin(block + 1) - k, after = last ? 0 : block + 1;
    const Block coming{begin(after), begin(after + 1) - begin(after), last ? panel_end : panel};
    float* sums = scratch;
    for_tiles(row, row_end, [&](int64_t first, int64_t rows) {
      const int64_t below = first + rows, more = row_end - below < kTile ? row_end - below : kTile;
      for (int64_t p = panel; p < panel_end; ++p) {
        fetch_next(g, below, more, k, depth, p - panel, panel_end - panel);
        if (last) fetch_result(g, first, rows, p * kPanel);
        const Ahead ahead = fetch_block(g, coming, p - panel, first - row, rows, row_end - row, depth);
        const float* b = g.b + (p * g.depth + k) * kPanel;
        any_tile<2>(int(rows), g.a + first * g.a_stride + k, g.a_stride, b, depth, sums, kPanel,
                    block > 0, beside.next(b, depth), ahead);
        if (last) finish(g, first, rows, p * kPanel, sums);
        if (blocks > 1) sums += rows * kPanel;
      }
    });
  }
}

}  // namespace

void panel_width(int64_t& width) { width = kPanel; }

void gemm_scratch(const Gemm& g, int64_t& floats) {
  const int64_t rows = g.rows < kMostRows ? g.rows : kMostRows;
  floats = blocks_of(g.depth) > 1 ? rows * kGroup * kPanel : kTileFloats;
}

// Rows [row, row_end) of C in panels [panel, panel_end).
void gemm_block(const Gemm& g, int64_t row, int64_t row_end, int64_t panel, int64_t panel_end,
                DotsPart share, float* scratch) {
  for (; row < row_end; row += kMostRows) {
    const int64_t stop = row + kMostRows < row_end ? row + kMostRows : row_end;
    Beside beside(share, row, stop, (panel_end - panel) * blocks_of(g.depth));
    share.begin = share.end;  // nothing is left for the next rows
    for (int64_t p = panel; p < panel_end; p += kGroup) {
      const int64_t end = p + kGroup < panel_end ? p + kGroup : panel_end;
      group_product(g, row, stop, p, end, beside, scratch);
    }
  }
}

void pack_panels(const Pack& p, int64_t begin, int64_t end) {
  for (int64_t panel = begin; panel < end; ++panel) {
    float* to = p.to + panel * p.depth * kPanel;
    for (int64_t k0 = 0; k0 < p.depth; k0 += 16)  // a cache line of each row at a time
      for (int column = 0; column < kPanel; ++column) {
        const int64_t row = panel * kPanel + column, stop = k0 + 16 < p.depth ? k0 + 16 : p.depth;
        for (int64_t k = k0; k < stop; ++k)
          to[k * kPanel + column] = row < p.rows ? p.weight[row * p.depth + k] : 0;
      }
  }
}

}  // namespace fastdit::FASTDIT_ISA
