// bias_gelu and its backward: x (and dout) in once, the result out once.
#include "cpu/bias_gelu.h"

#include "cpu/isa/gelu.h"
#include "cpu/isa/modulation.h"

namespace fastdit::FASTDIT_ISA {
namespace {

// Numbers ahead that are fetched: the loop's arithmetic fills the processor's window, so that it
// comes to the next loads and stores too late for tensors beyond the cache (a sixth of the time).
constexpr int64_t kAhead = 512, kResultAhead = 192;

#if defined(__AVX512F__) && FASTDIT_LANES == 16
constexpr int kTogether = 3;  // vectors; with 16 registers they would not all fit
#else
constexpr int kTogether = 1;
#endif

template <int K, class X, class Part>
INLINE void finish(const X* x, const float* bias, X* out, Part part) {
  Vec z[K];
  each<K>([&](int i) {
    prefetch(x + i * L, kAhead);
    prefetch_result(out + i * L, kResultAhead);
    z[i] = load(x + i * L, part) + load(bias + i * L, part);
  });
  gelu<sizeof(X) == 4>(z);
  each<K>([&](int i) { store(out + i * L, z[i], part); });
}

template <class X>
FLATTEN void forward(const BiasGelu& a, int64_t begin, int64_t end, const float* bias) {
  for (int64_t row = begin; row < end; ++row) {
    const X* x = static_cast<const X*>(a.x) + row * a.width;
    X* out = static_cast<X*>(a.out) + row * a.width;
    int64_t d = 0;
    for (; d + kTogether * L <= a.width; d += kTogether * L)
      finish<kTogether>(x + d, bias + d, out + d, Full{});
    for (; d + L <= a.width; d += L) finish<1>(x + d, bias + d, out + d, Full{});
    if (d < a.width) finish<1>(x + d, bias + d, out + d, Tail{int(a.width - d)});
  }
}

template <class X>
FLATTEN void backward(const BiasGelu& a, int64_t begin, int64_t end, const float* bias,
                      float* sums) {
  for (int64_t row = begin; row < end; ++row) {
    const X* x = static_cast<const X*>(a.x) + row * a.width;
    const X* dout = static_cast<const X*>(a.dout) + row * a.width;
    X* dx = static_cast<X*>(a.out) + row * a.width;
    sweep<1>(a.width, [&](int64_t d, auto part, int) {
      prefetch(x + d, kAhead);
      prefetch(dout + d, kAhead);
      const Vec z = load(x + d, part) + load(bias + d, part);
      const Vec gradient = load(dout + d, part) * gelu_derivative(z);
      store(dx + d, gradient, part);
      store(sums + d, load(sums + d, part) + gradient, part);
    });
  }
}

}  // namespace

void bias_gelu_rows(const BiasGelu& a, int64_t begin, int64_t end, float* scratch) {
  const float* bias = floats(a.bias, 0, 0, a.width, scratch);
  with_type(a.type, [&](auto x) { forward<decltype(x)>(a, begin, end, bias); });
}

void bias_gelu_backward_rows(const BiasGelu& a, int64_t begin, int64_t end, float* sums,
                             float* scratch) {
  const float* bias = floats(a.bias, 0, 0, a.width, scratch);
  with_type(a.type, [&](auto x) { backward<decltype(x)>(a, begin, end, bias, sums); });
}

}  // namespace fastdit::FASTDIT_ISA
