// The forward of adaln and gated_adaln: x (and y) read once from memory, out (and h) written once.
//
// One loop writes a row and sums the next, so that memory and arithmetic are busy together. The
// variance is mean(x²) − mean(x)² where |mean| is at most the standard deviation, which costs no
// more than the last bit of 1/std; other rows take a second pass about their mean c, corrected by
// what rounding c lost: with δ = mean(x − c) the mean is c + δ, the variance mean((x − c)²) − δ².
// Always taking the second pass was measured at 1.5x the time.
#include "../adaln.h"

#include "modulation.h"

namespace fastdit::FASTDIT_ISA {
namespace {

struct Moments {
  float centre, rest, rstd;  // the mean is centre + rest
};

INLINE float rstd_of(float variance, float eps) {
  return 1 / __builtin_sqrtf((variance < 0 ? 0 : variance) + eps);
}

template <class T>
INLINE Moments second_pass(const T* x, int64_t width, float eps, float centre) {
  const Vec c = all(centre);
  Vec rests[4] = {}, squares[4] = {};
  sweep(width, [&](int64_t d, auto part, int slot) {
    const Vec v = covered(load(x + d, part) - c, part);
    rests[slot] += v;
    squares[slot] += v * v;
  });
  const float rest = total(rests) / width;
  return {centre, rest, rstd_of(total(squares) / width - rest * rest, eps)};
}

struct Sums {
  float values, squares;
};

template <class T>
INLINE Moments moments(const T* x, const Sums& sums, int64_t width, float eps, bool rms) {
  const float mean = rms ? 0 : sums.values / width, variance = sums.squares / width - mean * mean;
  if (mean * mean <= variance && sums.squares <= __FLT_MAX__)
    return {0, mean, rstd_of(variance, eps)};
  return rms ? Moments{0, 0, rstd_of(variance, eps)} : second_pass(x, width, eps, mean);
}

// A row before its statistics: h = x + gate·y, stored on the way, or x itself.
template <class X>
struct Plain {
  const X* x;

  template <class Part>
  INLINE Vec at(int64_t d, Part part) const {
    return load(x + d, part);
  }
  INLINE const X* row() const { return x; }
};

template <class X, class Y>
struct Gated {
  const X* x;
  const Y* y;
  const float* gate;
  X* h;

  template <class Part>
  INLINE Vec at(int64_t d, Part part) const {
    const Vec v = load(x + d, part) + load(gate + d, part) * load(y + d, part);
    return store_rounded(h + d, v, part);
  }
  INLINE const X* row() const { return h; }
};

template <class Head>
INLINE Sums sums_of(const Head& head, int64_t width) {
  Vec values[4] = {}, squares[4] = {};
  sweep(width, [&](int64_t d, auto part, int slot) {
    const Vec v = head.at(d, part);
    values[slot] += v;
    squares[slot] += v * v;
  });
  return {total(values), total(squares)};
}

// Writes a row, and sums the next.
template <class X, class Next>
INLINE Sums normalise(const X* x, X* out, const Moments& m, Affine affine, int64_t width,
                      const Next& next) {
  const Vec centre = all(m.centre), rstd = all(m.rstd), rest = all(-m.rest * m.rstd);
  Vec values[4] = {}, squares[4] = {};
  sweep(width, [&](int64_t d, auto part, int slot) {
    const Vec unit = (load(x + d, part) - centre) * rstd + rest;
    store(out + d, unit * load(affine.mul + d, part) + load(affine.add + d, part), part);
    const Vec v = next.at(d, part);
    values[slot] += v;
    squares[slot] += v * v;
  });
  return {total(values), total(squares)};
}

template <class X, class Heads>
INLINE void rows(const Adaln& a, int64_t begin, int64_t end, float* scratch, Heads head) {
  const int64_t stride = scratch_row(a.width);
  const Affine affine{scratch, scratch + stride};
  const bool per_token = a.scale.token || a.shift.token;
  int64_t b = begin / a.tokens, n = begin % a.tokens;
  auto now = head(begin, b, n);
  Sums sums = sums_of(now, a.width);
  for (int64_t row = begin; row < end; ++row) {
    if (row == begin || n == 0 || per_token)
      fold(a, b, n, affine, scratch + 2 * stride, scratch + 3 * stride);
    const Moments m = moments(now.row(), sums, a.width, a.eps, a.rms);
    if (a.mean) a.mean[row] = m.centre + m.rest;
    if (a.rstd) a.rstd[row] = m.rstd;
    X* out = static_cast<X*>(a.out) + row * a.width;
    if (++n == a.tokens) n = 0, ++b;
    if (row + 1 == end) {
      normalise(now.row(), out, m, affine, a.width, Plain<X>{now.row()});
    } else {
      const auto next = head(row + 1, b, n);
      sums = normalise(now.row(), out, m, affine, a.width, next);
      now = next;
    }
  }
}

template <class X>
FLATTEN void plain_rows(const Adaln& a, int64_t begin, int64_t end, float* scratch) {
  rows<X>(a, begin, end, scratch, [&](int64_t, int64_t b, int64_t n) {
    return Plain<X>{static_cast<const X*>(a.x.data) + b * a.x.batch + n * a.x.token};
  });
}

template <class X, class Y>
FLATTEN void gated_rows(const Adaln& a, int64_t begin, int64_t end, float* scratch) {
  const float* gate = nullptr;
  rows<X>(a, begin, end, scratch, [&](int64_t row, int64_t b, int64_t n) {
    if (!gate || n == 0 || a.gate.token)
      gate = floats(a.gate, b, n, a.width, scratch + 4 * scratch_row(a.width));
    return Gated<X, Y>{static_cast<const X*>(a.x.data) + b * a.x.batch + n * a.x.token,
                       static_cast<const Y*>(a.y.data) + b * a.y.batch + n * a.y.token, gate,
                       static_cast<X*>(a.h) + row * a.width};
  });
}

}  // namespace

void adaln_rows(const Adaln& a, int64_t begin, int64_t end, float* scratch) {
  with_type(a.x.type, [&](auto x) {
    using X = decltype(x);
    if (!a.gate) return plain_rows<X>(a, begin, end, scratch);
    with_type(a.y.type, [&](auto y) { gated_rows<X, decltype(y)>(a, begin, end, scratch); });
  });
}

}  // namespace fastdit::FASTDIT_ISA
