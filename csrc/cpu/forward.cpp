// The native forward: a whole DiT in inference, one call.
//
// Between the products the residual stream is read and written by their epilogues alone: `x +=
// gate·(a·W + bias)` as a tile leaves its registers. What a product costs is then its arithmetic and
// one pass over its weights. docs/native_forward.md has the figures.
#include <atomic>

#include "cpu/forward_shared.h"

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

// Samples [begin, end) of a call.
struct Samples {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

// x (B, C, H, W) as rows of patches, channel by channel as a convolution's weight lies.
void gather_patches(const Dit& d, const Tensor& x, Samples samples, float* to, int64_t stride) {
  const int64_t sb = x.stride(0), sc = x.stride(1), sh = x.stride(2), sw = x.stride(3);
  const float* image = static_cast<const float*>(x.data_ptr()) + samples.begin * sb;
  const int64_t lines = samples.count() * d.grid_rows();
  shared(lines, double(lines) * d.grid_columns() * d.patch_size(), [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const float* from = image + line / d.grid_rows() * sb + line % d.grid_rows() * d.patch_rows * sh;
      for (int64_t column = 0; column < d.grid_columns(); ++column) {
        float* row = to + (line * d.grid_columns() + column) * stride;
        for (int64_t c = 0; c < d.channels; ++c)
          for (int64_t i = 0; i < d.patch_rows; ++i)
            for (int64_t j = 0; j < d.patch_columns; ++j)
              *row++ = from[c * sc + i * sh + (column * d.patch_columns + j) * sw];
      }
    }
  });
}

// Rows of pixels (patch, patch, C) as the image (B, C, H, W).
void scatter_pixels(const Dit& d, const float* rows, int64_t stride, int64_t batch, float* image) {
  const int64_t lines = batch * d.grid_rows(), plane = d.height * d.width;
  shared(lines, double(batch) * d.out_channels * plane, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      const int64_t sample = line / d.grid_rows();
      float* to = image + sample * d.out_channels * plane +
                  line % d.grid_rows() * d.patch_rows * d.width;
      const float* from = rows + line * d.grid_columns() * stride;
      for (int64_t c = 0; c < d.out_channels; ++c)
        for (int64_t i = 0; i < d.patch_rows; ++i)
          for (int64_t w = 0; w < d.width; ++w) {
            const int64_t pixel = i * d.patch_columns + w % d.patch_columns;
            to[c * plane + i * d.width + w] =
                from[w / d.patch_columns * stride + pixel * d.out_channels + c];
          }
    }
  });
}

// The modulation rows as padded vectors, each scale as 1 + scale.
void spread_modulations(const Dit& d, const Tensor& conditioning, Samples samples, float* to) {
  const int64_t batch = samples.count(), width = padded(d.hidden), count = 6 * d.depth + 2;
  const int64_t step = conditioning.stride(0);
  const float* from = static_cast<const float*>(conditioning.data_ptr()) + samples.begin * step;
  shared(batch * count, double(batch) * count * d.hidden, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t which = item % count;
      const float* row = from + item / count * step + which * d.hidden;
      const bool scale = which == count - 1 || (which < count - 2 && which % 3 == 1);
      float* out = to + item * width;
      for (int64_t i = 0; i < d.hidden; ++i) out[i] = row[i] + (scale ? 1.f : 0.f);
      std::fill(out + d.hidden, out + width, 0.f);
    }
  });
}

struct Forward {
  const Dit& d;
  const PackedLayout layout;
  const Workspace space;
  const float* packed;
  float* memory;
  int64_t batch, rows, stride;

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
  void run(const Linear& l, const Gemm& g, const Norm* n = nullptr) const {
    if (!l.group) {
      if (n) normalise(*n);
      return multiply(g);
    }
    const Quantized q = quantized(g);
    shared(rows, 4.0 * rows * g.depth, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        if (n) norm_rows(*n, row, row + 1);
        quantize_rows(q, row, row + 1);
      }
    });
    multiply(GemmInt8{g, q, reinterpret_cast<const int32_t*>(packed + l.weight), packed + l.scale,
                      reinterpret_cast<const int32_t*>(packed + l.sums)});
  }

  // stream += gate·Linear(a)
  void branch(const Linear& l, const float* a, int64_t a_stride, int64_t gate) const {
    Gemm g = gemm(l, a, a_stride, stream(), stride);
    g.epilogue = Epilogue::gate, g.row = modulation(gate), g.row_step = modulation_step();
    run(l, g);
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
    run(l[0], gemm(l[0], normed(), stride, wide(), wide_stride), &before);
    Attention a{wide(), wide_stride, normed(), stride, d.tokens(), d.heads, d.hidden / d.heads};
    attend(a, batch);
    branch(l[1], normed(), stride, first + 2);
    Gemm g = gemm(l[2], normed(), stride, wide(), wide_stride);
    g.epilogue = Epilogue::gelu;
    run(l[2], g, &between);
    branch(l[3], wide(), wide_stride, first + 5);
  }

  void finish(float* image, Samples samples) const {
    const Norm last = norm(6 * d.depth, 6 * d.depth + 1);
    run(layout.last, gemm(layout.last, normed(), stride, wide(), space.wide_stride), &last);
    image += samples.begin * d.out_channels * d.height * d.width;
    scatter_pixels(d, wide(), space.wide_stride, batch, image);
  }

  void run(const Tensor& x, const Tensor& conditioning, Samples samples, float* image) const {
    spread_modulations(d, conditioning, samples, memory + space.modulations);
    embed(x, samples);
    for (int64_t i = 0; i < d.depth; ++i) block(i);
    finish(image, samples);
  }
};

// How a batch is shared. As many samples as there are for every thread alike run in jobs, each by
// one thread from the first layer to the last: nobody waits, and what a thread wrote it finds in its
// own cache. The rest is shared within each layer. A job reads all the weights, so it needs
// rows enough for them, or weights that all threads find in the last cache.
struct Shares {
  int64_t jobs, alone, together, slots, most;  // samples alone and together; in the largest job

  Shares(const Dit& d, int64_t batch, int64_t group) {
    constexpr int64_t kRows = 256;  // of a job, whose wide rows stay in the second-level cache
    constexpr int64_t kFewRows = 64, kCached = 4 << 20;  // floats
    const int64_t workers = threads(), each = batch / workers;
    const bool few = each * d.tokens() < kFewRows && PackedLayout(d, group).floats > kCached;
    alone = few ? 0 : each * workers;
    together = batch - alone;
    const int64_t samples = std::max<int64_t>(1, kRows / d.tokens());
    jobs = alone ? workers * ((each + samples - 1) / samples) : 0;
    slots = std::max<int64_t>(1, std::min(workers, jobs));
    most = alone ? (alone + jobs - 1) / jobs : 0;
  }

  // Workspaces: one for each thread's job, or one for what is shared, after one another.
  int64_t slot(const Dit& d, int64_t group) const {
    return (Workspace(d, most, group).floats + 15) / 16 * 16;
  }
  int64_t floats(const Dit& d, int64_t group) const {
    return std::max(slots * slot(d, group), Workspace(d, together, group).floats);
  }
  Samples job(int64_t index) const {
    return {alone * index / jobs, alone * (index + 1) / jobs};
  }
};

int64_t forward_workspace(std::vector<int64_t> numbers, int64_t batch, bool int8) {
  const Dit d = dit_of(numbers);
  return Shares(d, batch, group_of(int8)).floats(d, group_of(int8)) + 16;
}

Tensor forward(const Tensor& x, const Tensor& conditioning, const Tensor& packed,
               const Tensor& workspace, std::vector<int64_t> numbers, bool int8) {
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
  const auto run = [&](Samples samples, float* space) {
    if (!samples.count()) return;
    Forward(d, samples.count(), group, weights, space).run(x, conditioning, samples, image);
  };
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, shares.slots, 1, [&](int64_t slot, int64_t) {
    const Alone alone;
    for (int64_t job; (job = next++) < shares.jobs;)
      run(shares.job(job), memory + slot * shares.slot(d, group));
  });
  run({shares.alone, batch}, memory);
  return out;
}

}  // namespace
}  // namespace fastdit

STABLE_TORCH_LIBRARY_FRAGMENT(fastdit_native, m) {
  m.def("forward_workspace(int[] dit, int batch, bool int8) -> int");
  m.def(
      "forward(Tensor x, Tensor conditioning, Tensor packed, Tensor workspace, int[] dit, bool int8) "
      "-> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(fastdit_native, CPU, m) {
  m.impl("forward", TORCH_BOX(&fastdit::forward));
}
STABLE_TORCH_LIBRARY_IMPL(fastdit_native, CompositeExplicitAutograd, m) {
  m.impl("forward_workspace", TORCH_BOX(&fastdit::forward_workspace));
}
