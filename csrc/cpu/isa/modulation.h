// Modulation and affine parameters as float rows, whatever they are stored as.
#pragma once

#include "cpu/isa/vec.h"

namespace fastdit::FASTDIT_ISA {

NOINLINE inline void converted(const Modulation& m, int64_t start, int64_t width, float* to) {
  with_type(m.type, [&](auto type) {
    using T = decltype(type);
    const T* from = static_cast<const T*>(m.data) + start;
    if (m.inner == 1) {
      sweep(width, [&](int64_t d, auto part, int) { store(to + d, load(from + d, part), part); });
      return;
    }
    for (int64_t d = 0; d < width; ++d) {
      const T lanes[L] = {from[d * m.inner]};
      to[d] = load(lanes, Full{})[0];
    }
  });
}

// The row of token n of sample b: where it lies if it is dense float, else written to `buffer`.
INLINE const float* floats(const Modulation& m, int64_t b, int64_t n, int64_t width,
                           float* buffer) {
  const int64_t start = b * m.batch + n * m.token;
  if (m.type == Type::f32 && m.inner == 1) return static_cast<const float*>(m.data) + start;
  converted(m, start, width, buffer);
  return buffer;
}

// Rows are modulation whose last axis is dense.
INLINE Modulation modulation(const Rows& rows) {
  return {rows.data, rows.type, rows.batch, rows.token, 1};
}

template <class X>
INLINE const X* row_of(const Rows& rows, int64_t b, int64_t n) {
  return static_cast<const X*>(rows.data) + b * rows.batch + n * rows.token;
}

// Row `row` of the dense tensor `to`, rounded to its type.
NOINLINE inline void store_row(const float* from, int64_t width, void* to, int64_t row, Type type) {
  with_type(type, [&](auto storage) {
    using T = decltype(storage);
    T* start = static_cast<T*>(to) + row * width;
    sweep<1>(width, [&](int64_t d, auto part, int) { store(start + d, load(from + d, part), part); });
  });
}

// One row's modulation of a normalised row x̂, weight and bias folded in: x̂·mul + add.
struct Affine {
  float* mul;
  float* add;
};

// `spare` is two rows.
template <class Arguments>
NOINLINE void fold(const Arguments& a, int64_t b, int64_t n, Affine to, float* spare) {
  const float* scale = a.scale ? floats(a.scale, b, n, a.width, to.mul) : nullptr;
  const float* shift = a.shift ? floats(a.shift, b, n, a.width, to.add) : nullptr;
  const float* w = a.weight ? floats(a.weight, 0, 0, a.width, spare) : nullptr;
  const float* c = a.bias ? floats(a.bias, 0, 0, a.width, spare + scratch_row(a.width)) : nullptr;
  const Vec plus = all(a.plus);
  sweep(a.width, [&](int64_t d, auto part, int) {
    const Vec m = scale ? plus + load(scale + d, part) : all(1);
    Vec add = shift ? load(shift + d, part) : Vec{};
    if (c) add = muladd(m, load(c + d, part), add);
    store(to.mul + d, w ? m * load(w + d, part) : m, part);
    store(to.add + d, add, part);
  });
}

}  // namespace fastdit::FASTDIT_ISA
