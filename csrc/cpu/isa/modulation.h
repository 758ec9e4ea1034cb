// Modulation and affine parameters as float rows, whatever they are stored as.
#pragma once

#include "vec.h"

namespace fastdit::FASTDIT_ISA {

// The row of token n of sample b: where it lies if it is dense float, else written to `buffer`.
INLINE const float* floats(const Modulation& m, int64_t b, int64_t n, int64_t width,
                           float* buffer) {
  const int64_t start = b * m.batch + n * m.token;
  if (m.type == Type::f32 && m.inner == 1) return static_cast<const float*>(m.data) + start;
  with_type(m.type, [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(m.data) + start;
    sweep(width, [&](int64_t d, auto part, int) {
      if (m.inner == 1) return store(buffer + d, load(from + d, part), part);
      T lanes[L] = {};
      for (int i = 0; i < part.lanes; ++i) lanes[i] = from[(d + i) * m.inner];
      store(buffer + d, load(lanes, Full{}), part);
    });
  });
  return buffer;
}

// One row's modulation of a normalised row x̂, weight and bias folded in: x̂·mul + add.
struct Affine {
  float* mul;
  float* add;
};

template <class Arguments>
INLINE void fold(const Arguments& a, int64_t b, int64_t n, Affine to, float* weight, float* bias) {
  const float* scale = a.scale ? floats(a.scale, b, n, a.width, to.mul) : nullptr;
  const float* shift = a.shift ? floats(a.shift, b, n, a.width, to.add) : nullptr;
  const float* w = a.weight ? floats(a.weight, 0, 0, a.width, weight) : nullptr;
  const float* c = a.bias ? floats(a.bias, 0, 0, a.width, bias) : nullptr;
  const Vec plus = all(a.plus);
  sweep(a.width, [&](int64_t d, auto part, int) {
    const Vec m = scale ? plus + load(scale + d, part) : all(1);
    Vec add = shift ? load(shift + d, part) : Vec{};
    if (c) add += m * load(c + d, part);
    store(to.mul + d, w ? m * load(w + d, part) : m, part);
    store(to.add + d, add, part);
  });
}

}  // namespace fastdit::FASTDIT_ISA
