// Calls of the CPU kernels on tensors of exactly their size, for sanitizers to watch. One a line:
//
//   <op> <seed> <batch> <tokens> <width> <type of x> <of y> <of modulation> <gap> <options>
//
// Types are 0 float, 1 bf16, 2 fp16; `gap` is what lies between rows. Options, a bit each: 1 and 2
// per-token shift and scale, 4 per-token gate, 8 no shift, 16 no scale, 32 weight, 64 bias, 128 rms,
// 256 a strided last axis of the modulation, 512 a width one too large, 1024 pieces that overlap. The
// rows run once in one piece and once in pieces: the bits must be the same.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "cpu/isa/adaln.cpp"
#include "cpu/isa/adaln_backward.cpp"
#include "cpu/isa/bias_gelu.cpp"
#include "cpu/isa/gated_residual.cpp"
#include "cpu/isa/glu.cpp"
#include "cpu/isa/reduce.cpp"

namespace isa = fastdit::FASTDIT_ISA;
using namespace fastdit;

namespace fastdit {
Isa current_isa() { return Isa::baseline; }
}  // namespace fastdit

namespace {

int64_t batch, tokens, width, gap, options;
Type x_type, y_type, m_type;
std::vector<std::unique_ptr<char[]>> memory;

bool has(int64_t option) { return options & option; }
int64_t bytes(Type type) { return type == Type::f32 ? 4 : 2; }

// `count` elements on the heap, to the byte, with numbers of about one.
void* tensor(int64_t count, Type type) {
  memory.emplace_back(new char[count * bytes(type)]);
  char* data = memory.back().get();
  for (int64_t i = 0; i < count; ++i) {
    float value = std::rand() / float(RAND_MAX) * 3 - 1;
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    const uint16_t half = type == Type::bf16 ? bits >> 16 : 0x3000 + std::rand() % 0x0c00;
    std::memcpy(data + i * bytes(type), type == Type::f32 ? (void*)&bits : (void*)&half,
                bytes(type));
  }
  return data;
}

Rows rows(Type type) {
  const int64_t row = width + gap;
  return {tensor(batch * tokens * row - gap, type), type, tokens * row, row};
}

Modulation modulation(bool per_token) {
  const int64_t inner = has(256) ? 3 : 1, row = (width - 1) * inner + 1 + gap;
  const int64_t count = batch * (per_token ? tokens : 1);
  return {tensor(count * row - gap, m_type), m_type, per_token ? tokens * row : row,
          per_token ? row : 0, inner};
}

Modulation parameter() { return {tensor(width, x_type), x_type, 0, 0, 1}; }

float* floats(int64_t count) { return static_cast<float*>(tensor(count, Type::f32)); }

template <class Arguments>
void set_modulation(Arguments& a, bool gated) {
  if (gated) a.gate = modulation(has(4)), a.y = rows(y_type);
  if (!has(8)) a.shift = modulation(has(1));
  if (!has(16)) a.scale = modulation(has(2));
  if (has(32) || has(64)) a.weight = parameter();
  if (has(64) && !has(128)) a.bias = parameter();
  a.rms = has(128), a.tokens = tokens, a.width = width + has(512);
}

// run(begin, end, scratch) over `count` items in pieces, each a thread under ThreadSanitizer, as
// PyTorch's pool would run them; option 1024 has each take an item of the next.
template <class Run>
void in_pieces(int64_t count, int64_t piece, int64_t scratch, Run run) {
  std::vector<std::thread> threads;
  for (int64_t begin = 0; begin < count; begin += piece) {
    const int64_t end = std::min(begin + piece + has(1024), count);
    float* own = floats(scratch);
#ifdef __SANITIZE_THREAD__
    threads.emplace_back([=] { run(begin, end, own); });
#else
    run(begin, end, own);
#endif
  }
  for (std::thread& thread : threads) thread.join();
}

// Runs over all rows, then in pieces, and compares what `results` hold.
template <class Run>
int twice(std::vector<std::pair<void*, int64_t>> results, int64_t count, int64_t piece,
          int64_t scratch, Run run) {
  std::vector<std::string> whole;
  run(0, count, floats(scratch));
  for (auto [data, size] : results) whole.emplace_back(static_cast<char*>(data), size);
  for (auto [data, size] : results) std::memset(data, 0x55, size);
  in_pieces(count, piece, scratch, run);
  for (size_t i = 0; i < results.size(); ++i)
    if (std::memcmp(whole[i].data(), results[i].first, results[i].second)) return 1;
  return 0;
}

int adaln(bool gated, int64_t piece) {
  const int64_t all = batch * tokens, size = all * width * bytes(x_type);
  Adaln a;
  a.x = rows(x_type);
  set_modulation(a, gated);
  a.out = tensor(all * width, x_type), a.h = gated ? tensor(all * width, x_type) : nullptr;
  a.rstd = floats(all), a.mean = a.rms ? nullptr : floats(all);
  a.eps = 1e-6f;
  std::vector<std::pair<void*, int64_t>> results{{a.out, size}, {a.rstd, all * 4}};
  if (gated) results.push_back({a.h, size});
  return twice(results, all, piece, kAdalnScratch * scratch_row(width),
               [=](int64_t begin, int64_t end, float* scratch) {
                 isa::adaln_rows(a, begin, end, scratch);
               });
}

// The sums depend on the chunks, which are fixed; here one sample is a chunk.
int adaln_backward(bool gated) {
  const int64_t all = batch * tokens, stride = scratch_row(width);
  AdalnBackward a;
  a.x = rows(x_type), a.dout = rows(x_type);
  set_modulation(a, gated);
  if (gated) a.dh = rows(x_type), a.dy = tensor(all * width, y_type);
  a.mean = a.rms ? nullptr : floats(all), a.rstd = floats(all);
  a.dx = tensor(all * width, x_type);
  if (a.shift.token) a.dshift = tensor(all * width, m_type);
  if (a.scale.token) a.dscale = tensor(all * width, m_type);
  if (a.gate.token) a.dgate = tensor(all * width, m_type);
  const bool scaled = a.scale.token && (a.weight || a.bias);
  std::vector<AdalnSums> sums;
  for (int64_t b = 0; b < batch; ++b)
    sums.push_back({floats(width), floats(width), scaled ? floats(width) : nullptr,
                    scaled ? floats(width) : nullptr, gated ? floats(width) : nullptr});
  in_pieces(batch, 1, kAdalnBackwardScratch * stride, [=](int64_t b, int64_t, float* scratch) {
    isa::adaln_backward_rows(a, b * tokens, (b + 1) * tokens, sums[b], scratch);
  });
  return 0;
}

int bias_gelu(int64_t piece) {
  const int64_t all = batch * tokens, size = all * width;
  BiasGelu a;
  a.x = tensor(size, x_type), a.dout = tensor(size, x_type), a.out = tensor(size, x_type);
  a.type = x_type, a.width = width, a.bias = modulation(false);
  float* sums = floats(width);
  in_pieces(all, all, scratch_row(width), [=](int64_t, int64_t end, float* scratch) {
    isa::bias_gelu_backward_rows(a, 0, end, sums, scratch);
  });
  return twice({{a.out, size * bytes(x_type)}}, all, piece, scratch_row(width),
               [=](int64_t begin, int64_t end, float* scratch) {
                 isa::bias_gelu_rows(a, begin, end, scratch);
               });
}

// Gate and up side by side, the gate second with option 4; biases unless 8; sums unless 16; the
// activation is what options leave over three.
int glu(int64_t piece) {
  const int64_t all = batch * tokens, size = all * width, row = 2 * width + gap;
  const auto halves = [=](void* data, int64_t stride) {
    Strided first{data, stride}, second{static_cast<char*>(data) + width * bytes(x_type), stride};
    return has(4) ? std::pair(second, first) : std::pair(first, second);
  };
  Glu a;
  std::tie(a.gate, a.up) = halves(tensor(all * row - gap, x_type), row);
  std::tie(a.dgate, a.dup) = halves(tensor(2 * size, x_type), 2 * width);
  a.dout = tensor(size, x_type), a.out = tensor(size, x_type);
  a.type = x_type, a.width = width, a.activation = Activation(options % 3);
  if (!has(8)) a.gate_bias = modulation(false), a.up_bias = modulation(false);
  float* sums = has(16) ? nullptr : floats(scratch_row(width) + width);
  const int64_t spare = scratch_row(width) + width;
  in_pieces(all, all, spare, [=](int64_t, int64_t end, float* scratch) {
    isa::glu_backward_rows(a, 0, end, sums, scratch);
  });
  return twice({{a.out, size * bytes(x_type)}}, all, piece, spare,
               [=](int64_t begin, int64_t end, float* scratch) {
                 isa::glu_rows(a, begin, end, scratch);
               });
}

int gated_residual(int64_t piece) {
  const int64_t all = batch * tokens, size = all * width;
  GatedResidual a;
  a.x = rows(x_type), a.y = rows(y_type), a.gate = modulation(has(4));
  a.out = tensor(size, x_type), a.tokens = tokens, a.width = width;
  const int64_t spare = kResidualScratch * scratch_row(width);
  const int different = twice({{a.out, size * bytes(x_type)}}, all, piece, spare,
                              [=](int64_t begin, int64_t end, float* scratch) {
                                isa::gated_residual_rows(a, begin, end, scratch);
                              });
  a.out = tensor(size, y_type);
  if (a.gate.token) a.dgate = tensor(size, m_type);
  std::vector<float*> sums;
  for (int64_t b = 0; b < batch; ++b) sums.push_back(floats(width));
  in_pieces(batch, 1, spare, [=](int64_t b, int64_t, float* scratch) {
    isa::gated_residual_backward_rows(a, b * tokens, (b + 1) * tokens, sums[b], scratch);
  });
  return different;
}

int run(const std::string& op, int64_t piece) {
  if (op == "adaln") return adaln(false, piece) + adaln_backward(false);
  if (op == "gated_adaln") return adaln(true, piece) + adaln_backward(true);
  if (op == "bias_gelu") return bias_gelu(piece);
  if (op == "glu") return glu(piece);
  if (op == "gated_residual") return gated_residual(piece);
  return 2;
}

}  // namespace

int main() {
  char op[32];
  long long n[9];
  while (std::scanf("%31s %lld %lld %lld %lld %lld %lld %lld %lld %lld", op, n, n + 1, n + 2, n + 3,
                    n + 4, n + 5, n + 6, n + 7, n + 8) == 10) {
    std::srand(n[0]);
    batch = n[1], tokens = n[2], width = n[3], gap = n[7], options = n[8];
    x_type = Type(n[4]), y_type = Type(n[5]), m_type = Type(n[6]);
    const int failed = run(op, 1 + n[0] % 3);
    memory.clear();
    if (failed) return std::printf("%s: the bits depend on the pieces\n", op), 1;
  }
  std::printf("0 failures\n");
  return 0;
}
