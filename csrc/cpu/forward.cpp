// The native forward: a whole DiT in inference, one call.
//
// Between the products the residual stream is read and written by their epilogues alone: `x +=
// gate·(a·W + bias)` as a tile leaves its registers. What a product costs is then its arithmetic and
// one pass over its weights. docs/native_forward.md has the figures.
#include <time.h>

#include <atomic>

#include "cpu/forward_edges.h"

namespace fastdit {
namespace {

// block(row, row_end, panel, panel_end) over a grid of panels and, where there are few, parts of the
// rows: four items a thread or more.
template <class F>
void in_blocks(const Gemm& g, const F& block) {
  const int64_t panels = (g.columns + panel() - 1) / panel();
  const int64_t wanted = threads() == 1 ? 1 : (4 * threads() + panels - 1) / panels;
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, g.rows / 16));
  shared(parts * panels, double(g.rows) * g.columns * g.depth, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t part = begin / panels, first = begin % panels;
      const int64_t last = std::min(panels, first + end - begin);
      block(g.rows * part / parts, g.rows * (part + 1) / parts, first, last);
      begin += last - first;
    }
  });
}

void multiply(const Gemm& g) {
  int64_t floats;
  gemm_scratch(g, floats);
  in_blocks(g, [&](int64_t row, int64_t row_end, int64_t first, int64_t last) {
    gemm_block(g, row, row_end, first, last, scratch_floats(floats));
  });
}

void multiply(const GemmInt8& g) {
  in_blocks(g.g, [&](int64_t row, int64_t row_end, int64_t first, int64_t last) {
    gemm_int8_block(g, row, row_end, first, last);
  });
}

void attend(Attention& a, int64_t batch) {
  const int64_t heads = batch * a.heads;
  const int64_t wanted = threads() == 1 ? 1 : (4 * threads() + heads - 1) / heads;
  a.parts = std::max<int64_t>(1, std::min(wanted, a.tokens / 64));
  const double work = 2.0 * heads * a.tokens * a.tokens * a.head_dim;
  shared(heads * a.parts, work, [&](int64_t begin, int64_t end) {
    int64_t floats;
    attention_scratch(a, floats);
    attention_items(a, begin, end, scratch_floats(floats));
  });
}

// What a forward's time is spent on, in the order of `seconds`.
enum class Part { embed, norm, qkv, attention, proj, fc1, fc2, last, kCount };

double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

struct Forward {
  const Dit& d;
  const PackedLayout layout;
  const Workspace space;
  const float* packed;
  float* memory;
  int64_t batch, rows, stride;
  double* seconds = nullptr;  // this thread's, of each part

  template <class F>
  void timed(Part part, const F& f) const {
    if (!seconds) return f();
    const double start = thread_seconds();
    f();
    seconds[int(part)] += thread_seconds() - start;
  }

  Forward(const Dit& dit, int64_t batch, int64_t group, const float* packed, float* memory)
      : d(dit), layout(dit, group), space(dit, batch, group), packed(packed), memory(memory),
        batch(batch), rows(batch * dit.tokens()), stride(row_stride(dit.hidden)) {}

  float* stream() const { return memory + space.stream; }
  float* normed() const { return memory + space.normed; }
  float* wide() const { return memory + space.wide; }
  const float* modulation(int64_t which) const {
    return memory + space.modulations + which * padded(d.hidden);
  }
  int64_t modulation_step() const { return (6 * d.depth + 2) * padded(d.hidden); }

  Gemm gemm(const Linear& l, const float* a, int64_t a_stride, float* c, int64_t c_stride) const {
    Gemm g;
    g.a = a, g.a_stride = a_stride, g.c = c, g.c_stride = c_stride;
    g.b = packed + l.weight, g.bias = packed + l.bias;
    g.rows = rows, g.columns = l.rows, g.depth = l.depth, g.tokens = d.tokens();
    return g;
  }

  Norm norm(int64_t shift, int64_t scale) const {
    Norm n;
    n.x = stream(), n.out = normed(), n.stride = stride;
    n.mul = modulation(scale), n.add = modulation(shift), n.mul_step = modulation_step();
    n.tokens = d.tokens(), n.width = d.hidden, n.eps = 1e-6f;
    return n;
  }

  void normalise(const Norm& n) const {
    shared(rows, double(rows) * n.width,
           [&](int64_t begin, int64_t end) { norm_rows(n, begin, end); });
  }

  Quantized quantized(const Gemm& g) const {
    auto* zeros = reinterpret_cast<int32_t*>(memory + space.zeros);
    auto* words = reinterpret_cast<uint32_t*>(memory + space.words);
    return {g.a, g.a_stride, g.depth, words, space.words_stride, memory + space.scales, zeros};
  }

  // g of the Linear, behind a normalisation if there is one: in 8 bits where the Linear is.
  void run(Part part, const Linear& l, const Gemm& g, const Norm* n = nullptr) const {
    if (!l.group) {
      if (n) timed(Part::norm, [&] { normalise(*n); });
      return timed(part, [&] { multiply(g); });
    }
    const Quantized q = quantized(g);
    const auto prepare = [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        if (n) norm_rows(*n, row, row + 1);
        quantize_rows(q, row, row + 1);
      }
    };
    timed(Part::norm, [&] { shared(rows, 4.0 * rows * g.depth, prepare); });
    const GemmInt8 product{g, q, reinterpret_cast<const int32_t*>(packed + l.weight), packed + l.scale,
                           reinterpret_cast<const int32_t*>(packed + l.sums)};
    timed(part, [&] { multiply(product); });
  }

  // stream += gate·Linear(a)
  void branch(Part part, const Linear& l, const float* a, int64_t a_stride, int64_t gate) const {
    Gemm g = gemm(l, a, a_stride, stream(), stride);
    g.epilogue = Epilogue::gate, g.row = modulation(gate), g.row_step = modulation_step();
    run(part, l, g);
  }

  void embed(const Tensor& x, Samples samples) const {
    gather_patches(d, x, samples, wide(), space.wide_stride);
    Gemm g = gemm(layout.patch, wide(), space.wide_stride, stream(), stride);
    g.bias = nullptr;
    g.epilogue = Epilogue::add;
    g.row = packed + layout.positions, g.row_step = padded(d.hidden);
    multiply(g);
  }

  void block(int64_t index) const {
    const Linear* l = &layout.blocks[PackedLayout::kPerBlock * index];
    const int64_t first = 6 * index, wide_stride = space.wide_stride;
    const Norm before = norm(first, first + 1), between = norm(first + 3, first + 4);
    run(Part::qkv, l[0], gemm(l[0], normed(), stride, wide(), wide_stride), &before);
    Attention a{wide(), wide_stride, normed(), stride, d.tokens(), d.heads, d.hidden / d.heads};
    timed(Part::attention, [&] { attend(a, batch); });
    branch(Part::proj, l[1], normed(), stride, first + 2);
    Gemm g = gemm(l[2], normed(), stride, wide(), wide_stride);
    g.epilogue = Epilogue::gelu;
    run(Part::fc1, l[2], g, &between);
    branch(Part::fc2, l[3], wide(), wide_stride, first + 5);
  }

  void finish(float* image, Samples samples) const {
    const Norm last = norm(6 * d.depth, 6 * d.depth + 1);
    run(Part::last, layout.last,
        gemm(layout.last, normed(), stride, wide(), space.wide_stride), &last);
    image += samples.begin * d.out_channels * d.height * d.width;
    timed(Part::last, [&] { scatter_pixels(d, wide(), space.wide_stride, batch, image); });
  }

  void run(const Tensor& x, const Tensor& conditioning, Samples samples, float* image) const {
    timed(Part::embed, [&] {
      spread_modulations(d, conditioning, samples, memory + space.modulations);
      embed(x, samples);
    });
    for (int64_t i = 0; i < d.depth; ++i) block(i);
    finish(image, samples);
  }
};

int64_t forward_workspace(std::vector<int64_t> numbers, int64_t batch, bool int8) {
  const Dit d = dit_of(numbers);
  return Shares(d, batch, group_of(int8)).floats(d, group_of(int8)) + 16;
}

// `seconds`, if given: processor time of each part is added to it, (threads, 8) in float64.
Tensor forward(const Tensor& x, const Tensor& conditioning, const Tensor& packed,
               const Tensor& workspace, std::vector<int64_t> numbers, bool int8,
               MaybeTensor seconds) {
  const Dit d = dit_of(numbers);
  const int64_t group = group_of(int8);
  const int64_t batch = x.dim() ? x.size(0) : 0;
  check_shape(x, {batch, d.channels, d.height, d.width}, "x");
  check_shape(conditioning, {batch, d.modulations()}, "conditioning");
  for (const Tensor* t : {&x, &conditioning})
    STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && t->is_cpu(), "x: must be float32");
  STD_TORCH_CHECK(conditioning.stride(1) == 1, "conditioning: rows must be dense");
  const float* weights = floats_of(packed, {PackedLayout(d, group).floats}, "packed");
  STD_TORCH_CHECK(weights[0] == float(panel()) && weights[1] == float(group),
                  "packed: for another instruction set");
  const Shares shares(d, batch, group);
  STD_TORCH_CHECK(workspace.numel() >= shares.floats(d, group) + 16, "workspace: too small");
  floats_of(workspace, {workspace.numel()}, "workspace");
  Tensor out = empty({batch, d.out_channels, d.height, d.width}, ScalarType::Float);
  if (batch == 0) return out;
  float* image = static_cast<float*>(out.data_ptr());
  const auto address = reinterpret_cast<uintptr_t>(workspace.data_ptr());
  float* memory = reinterpret_cast<float*>((address + 63) / 64 * 64);
  constexpr int64_t kParts = int64_t(Part::kCount);
  double* spent = nullptr;
  if (seconds) {
    STD_TORCH_CHECK(seconds->scalar_type() == ScalarType::Double && seconds->is_cpu() &&
                        seconds->is_contiguous(), "seconds: must be a contiguous float64 CPU tensor");
    check_shape(*seconds, {threads(), kParts}, "seconds");
    spent = static_cast<double*>(seconds->data_ptr());
  }
  const auto run = [&](Samples samples, int64_t slot) {
    if (!samples.count()) return;
    Forward f(d, samples.count(), group, weights, memory + slot * shares.slot(d, group));
    f.seconds = spent ? spent + slot * kParts : nullptr;
    f.run(x, conditioning, samples, image);
  };
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, shares.slots, 1, [&](int64_t slot, int64_t) {
    const Alone alone;
    for (int64_t job; (job = next++) < shares.jobs;)
      run(shares.job(job), slot);
  });
  run({shares.alone, batch}, 0);
  return out;
}

// Does nothing else for `steps` steps; returns how many operations of float32 that were.
int64_t multiply_adds(int64_t steps) {
  int64_t flop;
  fma_chains(steps, flop);
  return flop;
}

}  // namespace
}  // namespace fastdit

STABLE_TORCH_LIBRARY_FRAGMENT(fastdit_native, m) {
  m.def("forward_workspace(int[] dit, int batch, bool int8) -> int");
  m.def(
      "forward(Tensor x, Tensor conditioning, Tensor packed, Tensor workspace, int[] dit, bool int8, "
      "Tensor(a!)? seconds=None) -> Tensor");
  m.def("multiply_adds(int steps) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(fastdit_native, CPU, m) {
  m.impl("forward", TORCH_BOX(&fastdit::forward));
}
STABLE_TORCH_LIBRARY_IMPL(fastdit_native, CompositeExplicitAutograd, m) {
  m.impl("forward_workspace", TORCH_BOX(&fastdit::forward_workspace));
  m.impl("multiply_adds", TORCH_BOX(&fastdit::multiply_adds));
}
