// The forward of patch_embed: patches gathered as they are needed, a product over the K = C·p·q
// elements of a patch, bias and position added, and each token written once.
//
// A tile of tokens × outputs stays in registers over all of K. For it the weight, (D, K), is laid
// out in panels of V vectors of outputs once a call; K·D numbers beside the B·T·D of the result.
// Every element is summed in an order that K alone decides.
#include "cpu/isa/patches.h"

namespace fastdit::FASTDIT_ISA {
namespace {

template <class T>
void pack(const PatchEmbed& a, int64_t begin, int64_t end) {
  const T* weight = static_cast<const T*>(a.weight);
  const int64_t size = a.x.size();
  for (int64_t d = begin * kWidth; d < end * kWidth; ++d) {
    float* to = a.panels + d / kPanel * kPanel * size + d % kPanel;
    if (d >= a.width) {
      for (int64_t k = 0; k < size; ++k) to[k * kPanel] = 0;
      continue;
    }
    const T* row = weight + d * size;
    for (int64_t k = 0; k < size; k += L) {
      const int count = size - k < L ? int(size - k) : L;
      const Vec values = count == L ? load(row + k, Full{}) : load(row + k, Tail{count});
      for (int i = 0; i < count; ++i) to[(k + i) * kPanel] = values[i];
    }
  }
}

struct NoPos {
  template <class Part>
  INLINE Vec at(int64_t, int64_t, Part) const {
    return Vec{};
  }
};
template <class P>
struct Pos {
  const P* data;
  int64_t token;

  template <class Part>
  INLINE Vec at(int64_t n, int64_t d, Part part) const {
    return load(data + n * token + d, part);
  }
};

// Outputs [d, d + kPanel) of `count` tokens from `first` on.
template <class T, class P>
INLINE void tile(const PatchEmbed& a, const P& pos, const float* patches, int64_t first, int count,
                 int64_t d) {
  const int64_t size = a.x.size(), tokens = a.x.tokens();
  const float* panel = a.panels + d * size;
  Vec sums[R][V];
  product<V>(patches, size, 1, panel, kPanel, size < kChain ? size : kChain, sums);
  for (int64_t k = kChain; k < size; k += kChain) {
    const int64_t count = size - k < kChain ? size - k : kChain;
    Vec more[R][V];
    product<V>(patches + k, size, 1, panel + k * kPanel, kPanel, count, more);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[r][v] += more[r][v];
  }
  const auto finish = [&](int r, int v, auto part) __attribute__((always_inline)) {
    const int64_t at = d + v * L;
    Vec sum = sums[r][v] + load(a.biases + at, Full{});
    sum += pos.at((first + r) % tokens, at, part);
    store(static_cast<T*>(a.tokens) + (first + r) * a.width + at, sum, part);
  };
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    if (r >= count) break;
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const int64_t left = a.width - d - v * L;
      if (left >= L) {
        finish(r, v, Full{});
      } else if (left > 0) {
        finish(r, v, Tail{int(left)});
      }
    }
  }
}

template <class T, class P>
NOINLINE void tokens(const PatchEmbed& a, const P& pos, const float* patches, int64_t first,
                     int count) {
  for (int64_t d = 0; d < a.width; d += kPanel)
    for (int r = 0; r < count; r += R)
      tile<T>(a, pos, patches + r * a.x.size(), first + r, count - r, d);
}

template <class T>
void tokens_with_pos(const PatchEmbed& a, const float* patches, int64_t first, int count) {
  if (!a.pos) return tokens<T>(a, NoPos{}, patches, first, count);
  with_type(a.pos.type, [&](auto p) {
    using P = decltype(p);
    // The result is of the wider type: a pos wider than it does not exist.
    if constexpr (sizeof(P) <= sizeof(T))
      tokens<T>(a, Pos<P>{static_cast<const P*>(a.pos.data), a.pos.token}, patches, first, count);
  });
}

}  // namespace

void pack_panels(const PatchEmbed& a, int64_t begin, int64_t end) {
  with_type(a.x.type, [&](auto type) {
    using T = decltype(type);
    pack<T>(a, begin, end);
    const T* bias = static_cast<const T*>(a.bias);
    for (int64_t d = begin * kWidth; d < end * kWidth; d += L) {
      const int64_t left = bias ? a.width - d : 0;
      const Vec values = left >= L  ? load(bias + d, Full{})
                         : left > 0 ? load(bias + d, Tail{int(left)})
                                    : Vec{};
      store(a.biases + d, values, Full{});
    }
  });
}

void embed_tokens(const PatchEmbed& a, int64_t begin, int64_t end, float* scratch) {
  const int64_t size = a.x.size();
  for (int64_t first = begin; first < end; first += kTokens) {
    const int count = end - first < kTokens ? int(end - first) : int(kTokens);
    with_type(a.x.type, [&](auto type) {
      for (int r = 0; r < count; ++r)
        gather<decltype(type)>(a.x, first + r, scratch + r * size);
    });
    // Rows of a tile behind the last token are multiplied too, and not stored.
    for (int64_t i = count * size; i < kTokens * size; ++i) scratch[i] = 0;
    with_type(a.type, [&](auto type) {
      tokens_with_pos<decltype(type)>(a, scratch, first, count);
    });
  }
}

}  // namespace fastdit::FASTDIT_ISA
