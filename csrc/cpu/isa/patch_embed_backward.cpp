// The backward of patch_embed, from dtokens (B, T, D), which is read twice: once for dx, a product
// over D token by token, and once for the sums over tokens, dweight, dbias and dpos.
//
// The second is divided by outputs, not by tokens: no partial sums are kept, and each gradient is
// the same for any number of threads. Long sums go in blocks, each one chain of additions in
// float32, and the blocks' sums are added with compensation: what an addition rounds off goes into
// the next.
#include "cpu/isa/patches.h"

namespace fastdit::FASTDIT_ISA {
namespace {

constexpr int64_t kSamples = 8;  // added without compensation

// sum += value, both vectors in memory; `lost` is what the additions so far rounded off.
INLINE void add_exactly(float* sum, float* lost, Vec value) {
  const Vec before = load(sum, Full{}), corrected = value - load(lost, Full{});
  const Vec after = before + corrected, rest = (after - before) - corrected;
  store(lost, rest == rest ? rest : Vec{}, Full{});  // NaN where the sum is infinite, which stays
  store(sum, after, Full{});
}

INLINE void clear(float* floats, int64_t count) {
  for (int64_t i = 0; i < count; ++i) floats[i] = 0;
}

// `count` floats to elements of another type, `at` elements on.
INLINE void store_as(const float* from, int64_t count, void* to, int64_t at, Type type) {
  with_type(type, [&](auto t) {
    auto* row = static_cast<decltype(t)*>(to) + at;
    sweep(count, [&](int64_t i, auto part, int) { store(row + i, load(from + i, part), part); });
  });
}

// ---- dx ------------------------------------------------------------------------------------------

// to[r][k] += the product of `count` outputs, `vectors` vectors of k at once.
template <int vectors>
INLINE void add_inner(const float* grads, const float* weight, int64_t stride, int64_t count,
                      float* to, float* lost) {
  for (int64_t d = 0; d < count; d += kChain) {
    Vec sums[R][vectors];
    product<vectors>(grads + d, kInner, 1, weight + d * stride, stride,
                     count - d < kChain ? count - d : kChain, sums);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v)
        add_exactly(to + r * stride + v * L, lost + r * stride + v * L, sums[r][v]);
  }
}

// The patches' gradients of `count` tokens, from `first` on, in R rows `stride` floats apart; R rows
// of what they rounded off follow.
template <class G>
void patch_gradients(const PatchEmbedBackward& a, int64_t first, int count, float* grads,
                     float* to) {
  const int64_t size = a.dx.size(), stride = rounded_up(size, kWidth), tokens = a.dx.tokens();
  float* lost = to + R * stride;
  clear(to, 2 * R * stride);
  for (int64_t d = 0; d < a.width; d += kInner) {
    const int64_t outputs = a.width - d < kInner ? a.width - d : kInner;
    for (int r = 0; r < count; ++r) {
      const int64_t token = first + r;
      const G* from = static_cast<const G*>(a.dtokens.data) + token / tokens * a.dtokens.batch +
                      token % tokens * a.dtokens.token + d;
      sweep(outputs, [&](int64_t i, auto part, int) {
        store(grads + r * kInner + i, load(from + i, part), part);
      });
    }
    const float* weight = a.weight_rows + d * stride;
    int64_t k = 0;
    for (; k + L < size; k += kPanel) add_inner<V>(grads, weight + k, stride, outputs, to + k, lost + k);
    if (k < size) add_inner<1>(grads, weight + k, stride, outputs, to + k, lost + k);
  }
}

// ---- dweight, dbias, dpos ------------------------------------------------------------------------

// The sums of one panel of outputs.
struct Panel {
  float *weight, *weight_lost;  // (rounded_up(K, kTokens), kPanel)
  float *bias, *bias_lost;      // (kPanel)
};

// A block of tokens of one panel.
struct Block {
  float* grads;                       // (kBlock, kPanel)
  float *samples, *pos, *pos_lost;    // the same: sums over some samples, over all
};

// Widens dtokens of `count` tokens, outputs d on, and sums it for dbias and over samples.
template <class G>
INLINE void widen_block(const PatchEmbedBackward& a, int64_t sample, int64_t token, int64_t count,
                        int64_t d, const Block& block, const Panel& panel) {
  const G* from = static_cast<const G*>(a.dtokens.data) + sample * a.dtokens.batch +
                  token * a.dtokens.token + d;
  const bool first = sample % kSamples == 0;
  const auto columns = [&](int v, auto part) __attribute__((always_inline)) {
    Vec bias = {};
    for (int64_t t = 0; t < count; ++t) {
      const int64_t at = t * kPanel + v * L;
      const Vec grad = covered(load(from + t * a.dtokens.token + v * L, part), part);
      store(block.grads + at, grad, Full{});
      bias += grad;
      if (a.dpos)
        store(block.samples + at, first ? grad : load(block.samples + at, Full{}) + grad, Full{});
    }
    add_exactly(panel.bias + v * L, panel.bias_lost + v * L, bias);
  };
  for (int v = 0; v < V; ++v) {
    const int64_t left = a.width - d - v * L;
    if (left >= L) {
      columns(v, Full{});
    } else if (left > 0) {
      columns(v, Tail{int(left)});
    } else {
      for (int64_t t = 0; t < count; ++t) store(block.grads + t * kPanel + v * L, Vec{}, Full{});
    }
  }
}

INLINE void add_weight(const PatchEmbedBackward& a, int64_t token, int64_t count,
                       const Block& block, const Panel& panel) {
  const int64_t stride = rounded_up(a.x.size(), kTokens);
  for (int64_t k = 0; k < stride; k += R)
    for (int64_t t = 0; t < count; t += kChain) {
      Vec sums[R][V];
      product<V>(a.patches + (token + t) * stride + k, 1, stride, block.grads + t * kPanel, kPanel,
                 count - t < kChain ? count - t : kChain, sums);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) {
          const int64_t at = (k + r) * kPanel + v * L;
          add_exactly(panel.weight + at, panel.weight_lost + at, sums[r][v]);
        }
    }
}

template <class G>
NOINLINE void add_block(const PatchEmbedBackward& a, int64_t token, int64_t count, int64_t d,
                        const Block& block, const Panel& panel) {
  const int64_t tokens = a.dx.tokens(), width = a.width - d < kPanel ? a.width - d : kPanel;
  if (a.dpos) clear(block.pos, count * kPanel), clear(block.pos_lost, count * kPanel);
  for (int64_t sample = 0; sample < a.samples; ++sample) {
    widen_block<G>(a, sample, token, count, d, block, panel);
    if (a.dweight) add_weight(a, sample * tokens + token, count, block, panel);
    if (a.dpos && (sample % kSamples == kSamples - 1 || sample == a.samples - 1))
      for (int64_t at = 0; at < count * kPanel; at += L)
        add_exactly(block.pos + at, block.pos_lost + at, load(block.samples + at, Full{}));
  }
  if (a.dpos)
    for (int64_t t = 0; t < count; ++t)
      store_as(block.pos + t * kPanel, width, a.dpos, (token + t) * a.width + d, a.pos_type);
}

void store_panel(const PatchEmbedBackward& a, int64_t d, const Panel& panel, float* row) {
  const int64_t size = a.x.size(), width = a.width - d < kPanel ? a.width - d : kPanel;
  if (a.dbias) store_as(panel.bias, width, a.dbias, d, a.bias_type);
  if (!a.dweight) return;
  for (int64_t i = 0; i < width; ++i) {
    for (int64_t k = 0; k < size; ++k) row[k] = panel.weight[k * kPanel + i];
    store_as(row, size, a.dweight, (d + i) * size, a.weight_type);
  }
}

}  // namespace

void gather_patches(const PatchEmbedBackward& a, int64_t begin, int64_t end) {
  const int64_t size = a.x.size(), stride = rounded_up(size, kTokens);
  with_type(a.x.type, [&](auto type) {
    for (int64_t token = begin; token < end; ++token) {
      float* to = a.patches + token * stride;
      gather<decltype(type)>(a.x, token, to);
      clear(to + size, stride - size);
    }
  });
}

void pack_weight_rows(const PatchEmbedBackward& a, int64_t begin, int64_t end) {
  const int64_t size = a.dx.size();
  with_type(a.dx.type, [&](auto type) {
    widen_rows(static_cast<const decltype(type)*>(a.weight), begin, end, size,
               rounded_up(size, kWidth), a.weight_rows);
  });
}

void embed_image_gradient(const PatchEmbedBackward& a, int64_t begin, int64_t end,
                          float* scratch) {
  const int64_t size = a.dx.size(), stride = rounded_up(size, kWidth);
  float *grads = scratch, *sums = scratch + R * kInner;
  clear(grads, R * kInner);
  for (int64_t first = begin; first < end; first += R) {
    const int count = end - first < R ? int(end - first) : R;
    with_type(a.dtokens.type, [&](auto type) {
      patch_gradients<decltype(type)>(a, first, count, grads, sums);
    });
    with_type(a.dx.type, [&](auto type) {
      using T = decltype(type);
      T* stored = reinterpret_cast<T*>(sums + R * stride);
      for (int r = 0; r < count; ++r) {
        store_as(sums + r * stride, size, stored, 0, a.dx.type);
        for_patch(a.dx, patch_at<T>(a.dx, first + r), [&](T& to, int64_t k) { to = stored[k]; });
      }
    });
  }
}

void embed_parameter_gradients(const PatchEmbedBackward& a, int64_t begin, int64_t end,
                               float* scratch) {
  const int64_t rows = a.dweight ? rounded_up(a.x.size(), kTokens) : 0;
  const int64_t panel_floats = 2 * (rows + 1) * kPanel, block_floats = kBlock * kPanel;
  const Block block{scratch, scratch + block_floats, scratch + 2 * block_floats,
                    scratch + 3 * block_floats};
  float *row = scratch + 4 * block_floats, *sums = row + rounded_up(rows, kWidth);
  const int64_t last = end * kWidth < a.width ? end * kWidth : a.width;
  // Panels whose sums fit the cache go through dtokens together, in rows of up to 1 KiB.
  const int64_t fit = kSums / ((rows + 1) * kPanel), most = 256 / kPanel;
  const int64_t together = (fit < 1 ? 1 : fit < most ? fit : most) * kPanel;
  for (int64_t from = begin * kWidth; from < last; from += together) {
    const int64_t to = last - from < together ? last : from + together;
    const auto panel_at = [&](int64_t d) {
      float* at = sums + (d - from) / kPanel * panel_floats;
      return Panel{at, at + rows * kPanel, at + 2 * rows * kPanel, at + (2 * rows + 1) * kPanel};
    };
    clear(sums, (to - from + kPanel - 1) / kPanel * panel_floats);
    for (int64_t token = 0; token < a.dx.tokens(); token += kBlock) {
      const int64_t left = a.dx.tokens() - token, count = left < kBlock ? left : kBlock;
      for (int64_t d = from; d < to; d += kPanel)
        with_type(a.dtokens.type, [&](auto type) {
          add_block<decltype(type)>(a, token, count, d, block, panel_at(d));
        });
    }
    for (int64_t d = from; d < to; d += kPanel) store_panel(a, d, panel_at(d), row);
  }
}

}  // namespace fastdit::FASTDIT_ISA
