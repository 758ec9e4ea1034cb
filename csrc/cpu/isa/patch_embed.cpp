// patch_embed: a block of patches is gathered into cache as floats and multiplied by the transposed
// weight, six tokens by two vectors in registers; bias and position are added before the one
// rounding. A GEMM of its own would write the tokens, and read and write them again to add pos.
#include "cpu/patch_embed.h"

#include "cpu/isa/modulation.h"

namespace fastdit::FASTDIT_ISA {
namespace {

template <class X>
INLINE float scalar(const X* from) {
  if constexpr (__is_same(X, float)) return *from;
  const X lanes[L] = {*from};
  return load(lanes, Full{})[0];
}

// patches[k][r] = tap k of token `first` + r; tokens that are not there repeat the last.
template <class X>
NOINLINE void gather(const PatchEmbed& a, int64_t first, int64_t last, float* patches) {
  const int64_t width = a.columns * a.q, plane = a.rows * a.p * width;
  for (int64_t r = 0; r < kBlock; ++r) {
    const int64_t token = first + r < last ? first + r : last;
    const int64_t b = token / a.tokens(), t = token % a.tokens();
    const X* corner = static_cast<const X*>(a.image) + b * a.channels * plane +
                      t / a.columns * a.p * width + t % a.columns * a.q;
    float* to = patches + r;
    for (int64_t c = 0; c < a.channels; ++c)
      for (int64_t i = 0; i < a.p; ++i)
        for (int64_t j = 0; j < a.q; ++j, to += kBlock)
          *to = scalar(corner + c * plane + i * width + j);
  }
}

template <class Out>
FLATTEN void blocks(const PatchEmbed& a, int64_t begin, int64_t end, int64_t count,
                    float* scratch) {
  float *patches = scratch, *lines = scratch + scratch_row(kBlock * a.taps());
  const int64_t stride = a.stride(), taps = a.taps();
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kBlock, rest = count - first < kBlock ? count - first : kBlock;
    with_type(a.type, [&](auto x) { gather<decltype(x)>(a, first, count - 1, patches); });
    const float* pos[kBlock] = {};
    for (int64_t r = 0; a.pos && r < rest; ++r)
      pos[r] = floats(a.pos, 0, (first + r) % a.tokens(), a.width, lines + r * stride);
    for (int64_t d = 0; d < a.width; d += 2 * L) {
      const float* weight = a.weight + d;
      const Vec left = load(weight + taps * stride, Full{});
      const Vec right = load(weight + taps * stride + L, Full{});
      Vec sums[kBlock][2];
      for (int r = 0; r < kBlock; ++r) sums[r][0] = left, sums[r][1] = right;
      for (int64_t k = 0; k < taps; ++k, weight += stride) {
        const Vec one = load(weight, Full{}), two = load(weight + L, Full{});
#pragma GCC unroll 6
        for (int r = 0; r < kBlock; ++r) {
          const Vec tap = all(patches[k * kBlock + r]);
          sums[r][0] = muladd(tap, one, sums[r][0]);
          sums[r][1] = muladd(tap, two, sums[r][1]);
        }
      }
      for (int64_t r = 0; r < rest; ++r) {
        Out* out = static_cast<Out*>(a.out) + (first + r) * a.width + d;
        const float* added = pos[r] ? pos[r] + d : nullptr;
        sweep<1>(a.width - d < 2 * L ? a.width - d : 2 * L, [&](int64_t at, auto part, int) {
          const Vec sum = sums[r][at / L];
          store(out + at, added ? sum + load(added + at, part) : sum, part);
        });
      }
    }
  }
}

}  // namespace

void patch_embed_blocks(const PatchEmbed& a, int64_t begin, int64_t end, int64_t count,
                        float* scratch) {
  with_type(a.out_type, [&](auto out) { blocks<decltype(out)>(a, begin, end, count, scratch); });
}

void pack_weight(const PatchEmbed& a, const void* weight, const Modulation& bias, float* to) {
  const int64_t taps = a.taps(), stride = a.stride();
  __builtin_memset(to, 0, (taps + 1) * stride * sizeof(float));
  with_type(a.type, [&](auto storage) {
    const auto* from = static_cast<const decltype(storage)*>(weight);
    for (int64_t d = 0; d < a.width; ++d)
      for (int64_t k = 0; k < taps; ++k) to[k * stride + d] = scalar(from + d * taps + k);
  });
  if (bias) converted(bias, 0, a.width, to + taps * stride);
}

}  // namespace fastdit::FASTDIT_ISA
