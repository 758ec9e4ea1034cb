// Products in 8 bits: weights symmetric with a scale for each output channel, activations with a scale
// and a zero point for each token, sums exact in 32 bits.
//
// A word holds what one instruction multiplies and adds in a lane: with AVX-512 VNNI four activations
// (unsigned bytes) and four weights (signed bytes), elsewhere two of each in 16 bits (pmaddwd). AVX2's
// product of bytes adds pairs in 16 bits, which saturate: 255·127·2 > 32767. Taking a bit from the
// activations to avoid it would double their error for 1.3 times the speed.
#include "cpu/isa/epilogue.h"

namespace fastdit::FASTDIT_ISA {
namespace {

bool has_vnni() {
#if defined(__AVX512F__) && FASTDIT_LANES == 16
  static const bool found = __builtin_cpu_supports("avx512vnni");
  return found;
#else
  return false;
#endif
}

INLINE Ints load_ints(const int32_t* from) {
  Ints value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}
INLINE void store_ints(int32_t* to, Ints value) { __builtin_memcpy(to, &value, sizeof value); }

// sums + a₀·b₀ + a₁·b₁ of the 16-bit halves of each lane.
INLINE Ints dot_pairs(Ints sums, Ints a, Ints b) {
#if defined(__AVX512F__) && FASTDIT_LANES == 16
  return sums + (Ints)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif defined(__AVX2__) && FASTDIT_LANES == 8
  return sums + (Ints)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__) && FASTDIT_LANES == 4
  typedef short Shorts __attribute__((vector_size(16)));
  return sums + (Ints)__builtin_ia32_pmaddwd128((Shorts)a, (Shorts)b);
#else
  return sums + (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
#endif
}

#define FASTDIT_DOT_QUADS(sums, a, b) (Ints)_mm512_dpbusd_epi32((__m512i)sums, (__m512i)a, (__m512i)b)

// to[r][v] = Σ_g a[r][g]·b[g][v], a group a step. A macro, since VNNI's needs an attribute.
#define FASTDIT_TILE(name, attribute, dot)                                                       \
  template <int R>                                                                               \
  attribute NOINLINE void name(const uint32_t* a, int64_t a_stride, const int32_t* b,            \
                               int64_t groups, int32_t* to, Ahead ahead) {                       \
    Ints sums[R][2] = {};                                                                        \
    for (int64_t g = 0; g < groups; ++g, b += kPanel) {                                          \
      __builtin_prefetch(ahead.at + g * ahead.step);                                             \
      __builtin_prefetch(ahead.at + g * ahead.step + 64);                                        \
      const Ints left = load_ints(b), right = load_ints(b + L);                                  \
      _Pragma("GCC unroll 14") for (int r = 0; r < R; ++r) {                                     \
        const Ints number = Ints{} + int32_t(a[r * a_stride + g]);                               \
        sums[r][0] = dot(sums[r][0], number, left);                                              \
        sums[r][1] = dot(sums[r][1], number, right);                                             \
      }                                                                                          \
    }                                                                                            \
    _Pragma("GCC unroll 14") for (int r = 0; r < R; ++r) {                                       \
      store_ints(to + r * kPanel, sums[r][0]);                                                   \
      store_ints(to + r * kPanel + L, sums[r][1]);                                               \
    }                                                                                            \
  }

FASTDIT_TILE(tile_pairs, , dot_pairs)
#if defined(__AVX512F__) && FASTDIT_LANES == 16
FASTDIT_TILE(tile_quads, __attribute__((target("avx512vnni"))), FASTDIT_DOT_QUADS)
#endif

template <int R = kTile>
INLINE void any_int8_tile(int rows, bool quads, const uint32_t* a, int64_t a_stride,
                          const int32_t* b, int64_t groups, int32_t* to, Ahead ahead) {
  if (rows < R) {
    if constexpr (R > 1) any_int8_tile<R - 1>(rows, quads, a, a_stride, b, groups, to, ahead);
    return;
  }
#if defined(__AVX512F__) && FASTDIT_LANES == 16
  if (quads) return tile_quads<R>(a, a_stride, b, groups, to, ahead);
#endif
  tile_pairs<R>(a, a_stride, b, groups, to, ahead);
}

// The integers of a tile as what they stand for.
INLINE void dequantize(const GemmInt8& g, int64_t first, int64_t rows, int64_t column,
                       const int32_t* sums, float* to) {
  for (int64_t r = 0; r < rows; ++r) {
    const Vec scale = all(g.a.scale[first + r]);
    const Ints zero = Ints{} + g.a.zero[first + r];
#pragma GCC unroll 2
    for (int c = 0; c < kPanel; c += L) {
      const Ints sum = load_ints(sums + r * kPanel + c) - zero * load_ints(g.b_sums + column + c);
      const Vec weight = load(g.b_scale + column + c, Full{});
      store(to + r * kPanel + c, __builtin_convertvector(sum, Vec) * (scale * weight), Full{});
    }
  }
}

constexpr int64_t kGroupWords = 75 * 1024;  // of B, 300 KB: they stay in the second-level cache

}  // namespace

void int8_group(int64_t& group) { group = has_vnni() ? 4 : 2; }

void gemm_int8_block(const GemmInt8& g, int64_t row, int64_t row_end, int64_t panel,
                     int64_t panel_end, DotsPart share) {
  const bool quads = has_vnni();
  const int64_t group = quads ? 4 : 2, groups = (g.g.depth + group - 1) / group;
  const int64_t fitting = kGroupWords / (groups * kPanel), step = fitting > 1 ? fitting : 1;
  alignas(64) int32_t sums[kTile * kPanel];
  alignas(64) float tile[kTile * kPanel];
  Beside beside(share, row, row_end, panel_end - panel);
  for (int64_t from = panel; from < panel_end; from += step)
    for_tiles(row, row_end, [&](int64_t first, int64_t rows) {
      for (int64_t p = from; p < from + step && p < panel_end; ++p) {
        fetch_result(g.g, first, rows, p * kPanel);
        const int32_t* b = g.b + p * groups * kPanel;
        any_int8_tile(int(rows), quads, g.a.words + first * g.a.stride, g.a.stride, b, groups, sums,
                      beside.next(b, groups));
        dequantize(g, first, rows, p * kPanel, sums, tile);
        finish(g.g, first, rows, p * kPanel, tile);
      }
    });
}

// Weights: q = round(w / scale), scale = max|w| / 127. A row that is not finite has a NaN for scale.
void pack_int8_panels(const PackInt8& p, int64_t begin, int64_t end) {
  const int group = has_vnni() ? 4 : 2, bits = 32 / group;
  const int64_t groups = (p.depth + group - 1) / group;
  for (int64_t row = begin * kPanel; row < end * kPanel; ++row) {
    const float* w = p.weight + row * p.depth;
    int32_t* to = p.to + row / kPanel * groups * kPanel + row % kPanel;
    const bool real = row < p.rows;
    Vec tops = {}, rests = {};
    if (real)
      sweep<1>(p.depth, [&](int64_t k, auto part, int) {
        const Vec v = load(w + k, part);
        tops = max(tops, v < 0 ? -v : v);
        rests += v - v;  // NaN where v is not finite
      });
    float top = 0;
    for (int i = 0; i < L; ++i) top = top < tops[i] ? tops[i] : top;
    const float scale = top > 0 ? top / 127 : 1, rest = total(rests);
    const float inverse = rest == rest ? 1 / scale : 0;
    int32_t sum = 0;
    for (int64_t g = 0; g < groups; ++g) {
      uint32_t word = 0;
      for (int i = 0; real && i < group && g * group + i < p.depth; ++i) {
        const float scaled = w[g * group + i] * inverse;
        const int32_t q = rest == rest ? int32_t(__builtin_rintf(scaled)) : 0;
        sum += q;
        word |= (uint32_t(q) & (group == 4 ? 0xffu : 0xffffu)) << (i * bits);
      }
      to[g * kPanel] = int32_t(word);
    }
    p.scale[row] = real ? scale + rest : 0;
    p.sums[row] = sum;
  }
}

// Activations: the range of a row and zero divided by 255. Zero is a number of the grid, and of a
// GELU's results, which are hardly negative, few steps are wasted on what does not occur.
FLATTEN void quantize_rows(const Quantized& a, int64_t begin, int64_t end) {
  typedef uint8_t Bytes __attribute__((vector_size(L)));
  typedef int16_t Shorts __attribute__((vector_size(2 * L)));
  const bool quads = has_vnni();
  for (int64_t row = begin; row < end; ++row) {
    const float* x = a.x + row * a.x_stride;
    Vec highs = {}, lows = {}, rests = {};
    sweep<1>(a.width, [&](int64_t d, auto part, int) {
      const Vec v = load(x + d, part);
      highs = max(highs, v);
      lows = min(lows, v);
      rests += v - v;  // NaN where v is not finite
    });
    float high = 0, low = 0;
    for (int i = 0; i < L; ++i) {
      high = high < highs[i] ? highs[i] : high;
      low = low > lows[i] ? lows[i] : low;
    }
    const float rest = total(rests), range = high - low;
    const bool finite = rest == rest && range <= __FLT_MAX__;
    const float scale = range > 0 && finite ? range / 255 : 1, inverse = 1 / scale;
    const float zero = finite ? __builtin_rintf(-low * inverse) : 0;
    a.scale[row] = finite ? scale : __builtin_nanf("");
    a.zero[row] = int32_t(zero);
    uint32_t* words = a.words + row * a.stride;
    sweep<1>(a.width, [&](int64_t d, auto part, int) {
      const Vec shifter = all(0x1.8p23f);
      const Vec level = min(max(muladd(load(x + d, part), all(inverse), all(zero)), Vec{}), all(255));
      const Ints q = (Ints)(level + shifter) & 0xff;
      const Bytes bytes = __builtin_convertvector(q, Bytes);
      const Shorts shorts = __builtin_convertvector(q, Shorts);
      if (quads)
        __builtin_memcpy(reinterpret_cast<uint8_t*>(words) + d, &bytes, part.lanes);
      else
        __builtin_memcpy(reinterpret_cast<int16_t*>(words) + d, &shorts, 2 * part.lanes);
    });
    const int64_t size = quads ? 1 : 2;
    auto* memory = reinterpret_cast<uint8_t*>(words);
    for (int64_t i = a.width * size; i % 4; ++i) memory[i] = 0;
  }
}

}  // namespace fastdit::FASTDIT_ISA
