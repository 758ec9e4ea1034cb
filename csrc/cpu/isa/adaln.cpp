// The forward of adaln and gated_adaln: x (and y) read once from memory, out (and h) written once.
//
// One loop writes a block of rows and sums the next block, so that memory and arithmetic are busy
// together. With a gate a block is two rows, which share the loads of their modulation; without,
// two rows were measured at 1.35 times the time of one. The variance is
// mean(x²) − mean(x)² where |mean| is at most the standard deviation, which costs no more than the
// last bit of 1/std; other rows take a second pass about their mean c, corrected by what rounding c
// lost: with δ = mean(x − c) the mean is c + δ and the variance mean((x − c)²) − δ². Always taking
// the second pass was measured at 1.5 times the time.
//
// A row's arithmetic does not depend on the rows beside it: any division of the rows among
// threads gives the same bits.
#include "cpu/adaln.h"

#include "cpu/isa/modulation.h"

namespace fastdit::FASTDIT_ISA {
namespace {

// unit = (x − centre)·rstd + offset, where centre is the mean as a float or zero.
struct Moments {
  float mean, rstd, centre, offset;
};

// A row's few scalars are in double: an error of 1/std would be one of every element.
INLINE Moments moments_of(double centre, double rest, double variance, float eps) {
  const double rstd = 1 / __builtin_sqrt((variance < 0 ? 0 : variance) + eps);
  return {float(centre + rest), float(rstd), float(centre), float(-rest * rstd)};
}

template <class X>
INLINE Moments second_pass(const Adaln& a, const X* x, float centre) {
  const Vec c = all(centre);
  Vec rests[4] = {}, squares[4] = {};
  sweep(a.width, [&](int64_t d, auto part, int slot) {
    const Vec v = covered(load(x + d, part) - c, part);
    rests[slot] += v;
    squares[slot] = muladd(v, v, squares[slot]);
  });
  const double rest = double(total(rests)) / a.width;
  return moments_of(centre, rest, double(total(squares)) / a.width - rest * rest, a.eps);
}

// `share` is 1/width: two divisions less in the row's longest chain of operations.
template <class X>
INLINE Moments moments(const Adaln& a, const X* x, double share, double sum, double squares) {
  const double square = squares * share, mean = sum * share;
  if (a.rms) return moments_of(0, 0, square, a.eps);
  const double variance = square - mean * mean;
  if (mean * mean <= variance && squares <= __FLT_MAX__)
    return moments_of(0, mean, variance, a.eps);
  return second_pass(a, x, float(mean));
}

// R rows of one sample before their statistics: x as it is.
template <class X, int R>
struct Plain {
  static constexpr int chains = 4;
  const X* x[R];

  template <class Part>
  INLINE void at(int64_t d, Part part, Vec (&v)[R]) const {
    for (int r = 0; r < R; ++r) v[r] = load(x[r] + d, part);
  }
  INLINE const X* row(int r) const { return x[r]; }
};

// h = x + gate·y, stored on the way; the statistics are those of h as it is stored.
template <class X, class Y, int R>
struct Gated {
  static constexpr int chains = 2;
  const float* gate;
  const X* x[R];
  const Y* y[R];
  X* h[R];

  template <class Part>
  INLINE void at(int64_t d, Part part, Vec (&v)[R]) const {
    const Vec g = load(gate + d, part);
    for (int r = 0; r < R; ++r) {
      const Vec sum = muladd(g, load(y[r] + d, part), load(x[r] + d, part));
      v[r] = store_rounded(h[r] + d, sum, part);
    }
  }
  INLINE const X* row(int r) const { return h[r]; }
};

// Sums over R rows at once, each in independent chains: as many for one row as for two, so that a
// row's bits do not depend on where a block begins.
template <int R, int chains>
struct Chains {
  Vec values[R][chains] = {}, squares[R][chains] = {};

  INLINE void add(const Vec (&v)[R], int slot) {
    for (int r = 0; r < R; ++r) {
      const Vec once = in_register(v[r]);  // else loaded for each use: a tenth of the time
      values[r][slot] += once;
      squares[r][slot] = muladd(once, once, squares[r][slot]);
    }
  }
};

// What has become of them. A function that returns chains keeps them in memory and stores each at
// every step: 1.4 times the time of a row with a gate.
template <int R>
struct Sums {
  float values[R], squares[R];

  template <int chains>
  INLINE explicit Sums(const Chains<R, chains>& c) {
    for (int r = 0; r < R; ++r) values[r] = total(c.values[r]), squares[r] = total(c.squares[r]);
  }
};

template <int R, class Head>
INLINE Sums<R> sums_of(const Head& head, int64_t width) {
  Chains<R, Head::chains> chains;
  sweep<Head::chains>(width, [&](int64_t d, auto part, int slot) {
    Vec v[R];
    head.at(d, part, v);
    chains.add(v, slot);
  });
  return Sums<R>(chains);
}

// What R rows are written with, from their sums; their statistics are kept where they are wanted.
template <int R>
struct Statistics {
  Moments of[R];

  template <class Head>
  INLINE Statistics(const Adaln& a, int64_t row, const Head& head, double share,
                    const Sums<R>& sums) {
    for (int r = 0; r < R; ++r) {
      of[r] = moments(a, head.row(r), share, sums.values[r], sums.squares[r]);
      if (a.mean) a.mean[row + r] = of[r].mean;
      if (a.rstd) a.rstd[row + r] = of[r].rstd;
    }
  }
};

struct NoNext {};

// Writes R rows, and sums the next R where there are as many.
template <int R, class X, class Head, class Next>
INLINE Sums<R> normalise(const Adaln& a, int64_t row, const Head& head,
                               const Statistics<R>& statistics, Affine affine, const Next& next) {
  Vec centre[R], rstd[R], offset[R];
  X* out[R];
  for (int r = 0; r < R; ++r) {
    const Moments& m = statistics.of[r];
    centre[r] = all(m.centre), rstd[r] = all(m.rstd), offset[r] = all(m.offset);
    out[r] = static_cast<X*>(a.out) + (row + r) * a.width;
  }
  Chains<R, Head::chains> following;
  sweep<Head::chains>(a.width, [&](int64_t d, auto part, int slot) {
    const Vec mul = load(affine.mul + d, part), add = load(affine.add + d, part);
    for (int r = 0; r < R; ++r) {
      const Vec unit = muladd(load(head.row(r) + d, part) - centre[r], rstd[r], offset[r]);
      store(out[r] + d, muladd(unit, mul, add), part);
    }
    if constexpr (!__is_same(Next, NoNext)) {
      Vec v[R];
      next.at(d, part, v);
      following.add(v, slot);
    }
  });
  return Sums<R>(following);
}

// Rows [begin, end) of one sample: in blocks where they share their modulation.
template <class X, class Heads>
INLINE void sample_rows(const Adaln& a, int64_t begin, int64_t end, float* scratch, Heads& heads) {
  const int64_t stride = scratch_row(a.width), b = begin / a.tokens;
  const Affine affine{scratch, scratch + stride};
  const bool per_token = a.scale.token || a.shift.token || a.gate.token;
  constexpr int R = Heads::block;
  const double share = 1.0 / a.width;
  int64_t row = begin;
  if (!per_token) {
    fold(a, b, 0, affine, scratch + 2 * stride);
    if (row + R <= end) {
      auto head = heads.template at<R>(b, row);
      auto sums = sums_of<R>(head, a.width);
      for (; row + 2 * R <= end; row += R) {
        const auto next = heads.template at<R>(b, row + R);
        sums = normalise<R, X>(a, row, head, {a, row, head, share, sums}, affine, next);
        head = next;
      }
      normalise<R, X>(a, row, head, {a, row, head, share, sums}, affine, NoNext{});
      row += R;
    }
  }
  for (; row < end; ++row) {
    if (per_token) fold(a, b, row - b * a.tokens, affine, scratch + 2 * stride);
    const auto head = heads.template at<1>(b, row);
    normalise<1, X>(a, row, head, {a, row, head, share, sums_of<1>(head, a.width)}, affine, NoNext{});
  }
}

template <class X, class Heads>
FLATTEN void forward_rows(const Adaln& a, int64_t begin, int64_t end, float* scratch, Heads heads) {
  while (begin < end) {
    const int64_t sample_end = (begin / a.tokens + 1) * a.tokens;
    const int64_t stop = sample_end < end ? sample_end : end;
    sample_rows<X>(a, begin, stop, scratch, heads);
    begin = stop;
  }
}

template <class X>
struct PlainHeads {
  static constexpr int block = 1;
  const Adaln& a;

  template <int R>
  INLINE Plain<X, R> at(int64_t b, int64_t row) const {
    Plain<X, R> head;
    for (int r = 0; r < R; ++r) head.x[r] = row_of<X>(a.x, b, row + r - b * a.tokens);
    return head;
  }
};

// Y is how y is read: as it is stored, which is X, or as floats, in `branch` if it is stored shorter.
template <class X, class Y>
struct GatedHeads {
  static constexpr int block = 2;
  const Adaln& a;
  float *buffer, *branch;
  const float* gate = nullptr;  // of `sample`, where tokens share it
  int64_t sample = -1;

  template <int R>
  INLINE Gated<X, Y, R> at(int64_t b, int64_t row) {
    const int64_t n = row - b * a.tokens;
    if (b != sample || a.gate.token) gate = floats(a.gate, b, n, a.width, buffer);
    sample = b;
    Gated<X, Y, R> head;
    head.gate = gate;
    for (int r = 0; r < R; ++r) {
      head.x[r] = row_of<X>(a.x, b, n + r);
      head.h[r] = static_cast<X*>(a.h) + (row + r) * a.width;
      head.y[r] = row_of<Y>(a.y, b, n + r);
      if constexpr (__is_same(Y, float)) {
        head.y[r] = floats(modulation(a.y), b, n + r, a.width, branch + r * scratch_row(a.width));
      }
    }
    return head;
  }
};

}  // namespace

void adaln_rows(const Adaln& a, int64_t begin, int64_t end, float* scratch) {
  with_type(a.x.type, [&](auto x) {
    using X = decltype(x);
    float* buffer = scratch + 4 * scratch_row(a.width);
    if (!a.gate) return forward_rows<X>(a, begin, end, scratch, PlainHeads<X>{a});
    float* branch = buffer + scratch_row(a.width);
    if (a.y.type == a.x.type)
      return forward_rows<X>(a, begin, end, scratch, GatedHeads<X, X>{a, buffer, branch});
    forward_rows<X>(a, begin, end, scratch, GatedHeads<X, float>{a, buffer, branch});
  });
}

}  // namespace fastdit::FASTDIT_ISA
