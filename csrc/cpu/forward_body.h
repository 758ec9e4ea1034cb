// A DiT's layers for some rows of a call: the products, and what is between them.
//
// Stage 0 is the embedding and the first layer as far as its qkv; each further stage attention and
// what is behind it of one layer, then the next as far as its qkv, or the last product. Only
// attention reads rows of other tokens.
#pragma once

#include <time.h>

#include "cpu/forward_edges.h"
#include "cpu/forward_modulation.h"

namespace fastdit {

// block(row, row_end, panel, panel_end, share) over a grid of panels and, where there are few, parts
// of the rows: four items a thread or more.
template <class F>
void in_blocks(const Gemm& g, const F& block) {
  const int64_t panels = (g.columns + panel() - 1) / panel();
  const int64_t wanted = threads() == 1 ? 1 : (4 * threads() + panels - 1) / panels;
  const int64_t parts = std::max<int64_t>(1, std::min(wanted, g.rows / 16));
  const int64_t items = parts * panels;
  shared(items, double(g.rows) * g.columns * g.depth, [&](int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t part = begin / panels, first = begin % panels;
      const int64_t last = std::min(panels, first + end - begin), next = begin + last - first;
      block(g.rows * part / parts, g.rows * (part + 1) / parts, first, last,
            g.beside.part(begin, next, items));
      begin = next;
    }
  });
}

inline void multiply(const Gemm& g) {
  int64_t floats;
  gemm_scratch(g, floats);
  in_blocks(g, [&](int64_t row, int64_t row_end, int64_t first, int64_t last, DotsPart beside) {
    gemm_block(g, row, row_end, first, last, beside, scratch_floats(floats));
  });
}

inline void multiply(const GemmInt8& g) {
  in_blocks(g.g, [&](int64_t row, int64_t row_end, int64_t first, int64_t last, DotsPart beside) {
    gemm_int8_block(g, row, row_end, first, last, beside);
  });
}

inline void attend(Attention& a, int64_t batch) {
  const int64_t heads = batch * a.heads;
  const int64_t wanted = threads() == 1 ? 1 : (4 * threads() + heads - 1) / heads;
  a.parts = std::max<int64_t>(1, std::min(wanted, a.queries / 64));
  const double work = 2.0 * heads * a.queries * a.tokens * a.head_dim;
  shared(heads * a.parts, work, [&](int64_t begin, int64_t end) {
    int64_t floats;
    attention_scratch(a, floats);
    attention_items(a, begin, end, scratch_floats(floats));
  });
}

// What a forward's time is spent on, in the order of `seconds`.
enum class Part { embed, norm, qkv, attention, proj, fc1, fc2, last, kCount };

inline double thread_seconds() {
  timespec now;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
  return double(now.tv_sec) + 1e-9 * double(now.tv_nsec);
}

// What all rows of a call have in common.
struct Call {
  const Dit& d;
  const PackedLayout& layout;
  const float* packed;
  const Tensor& x;
  const ModulationWeights& modulation;
  const Tensor* conditioning;  // rows, if they were given
  float* image;
};

class Forward {
 public:
  // `memory` holds the workspace of samples from `first` on, of which these rows are some.
  Forward(const Call& call, const Workspace& space, float* memory, int64_t first, Span rows,
          double* seconds)
      : call(call), d(call.d), layout(call.layout), space(space), memory(memory), rows(rows),
        sample(rows.begin - first), row(sample * d.tokens() + rows.token),
        stride(row_stride(d.hidden)), seconds(seconds) {}

  int64_t stages() const { return d.depth + 1; }

  // The modulations of these samples, all that were given, or the first layer's.
  void prepare() {
    timed(Part::embed, [&] {
      if (call.conditioning) {
        spread_modulations(d, *call.conditioning, rows.begin, rows.samples(), modulations());
        return;
      }
      const int64_t width = padded(d.hidden), vectors = rows.samples() * (6 * d.depth + 2);
      for (int64_t i = 0; width != d.hidden && i < vectors; ++i)
        std::fill(modulations() + i * width + d.hidden, modulations() + (i + 1) * width, 0.f);
      multiply(call.modulation.dots(d, 0, rows.begin, rows.end, modulations()),
               ModulationWeights::columns(d, 0));
    });
  }

  // These rows are the `index`-th of `count` parts of their sample.
  void stage(int64_t index, int64_t part, int64_t count) {
    DotsPart beside;
    Dots dots;
    if (!call.conditioning && index < d.depth) {
      dots = call.modulation.dots(d, index + 1, rows.begin, rows.end, modulations());
      const int64_t columns = ModulationWeights::columns(d, index + 1);
      beside = {&dots, columns * part / count, columns * (part + 1) / count};
    }
    const int64_t attention = index ? d.hidden * (d.hidden + 2 * d.mlp) : 0;
    all_beside = beside, work_done = 0, work = attention + 3 * d.hidden * d.hidden;
    if (index)
      finish_block(index - 1);
    else
      timed(Part::embed, [&] { embed(); });
    if (index < d.depth)
      begin_block(index);
    else
      finish();
  }

 private:
  const Call& call;
  const Dit& d;
  const PackedLayout& layout;
  const Workspace& space;
  float* memory;
  const Span rows;
  const int64_t sample, row, stride;  // the first sample and row in memory
  double* seconds;  // this thread's, of each part
  DotsPart all_beside;  // of a stage, and how much work of it is done
  int64_t work_done = 0, work = 1;

  template <class F>
  void timed(Part part, const F& f) const {
    if (!seconds) return f();
    const double start = thread_seconds();
    f();
    seconds[int(part)] += thread_seconds() - start;
  }

  float* stream() const { return memory + space.stream + row * stride; }
  float* normed() const { return memory + space.normed + row * stride; }
  float* wide() const { return memory + space.wide + row * space.wide_stride; }
  float* keys(int64_t index) const {  // qkv of the whole sample
    return memory + space.qkv[index % 2] + (row - rows.token) * space.wide_stride;
  }
  int64_t modulation_step() const { return (6 * d.depth + 2) * padded(d.hidden); }
  float* modulations() const { return memory + space.modulations + sample * modulation_step(); }
  const float* modulation(int64_t which) const { return modulations() + which * padded(d.hidden); }

  Gemm gemm(const Linear& l, const float* a, int64_t a_stride, float* c, int64_t c_stride) const {
    Gemm g;
    g.a = a, g.a_stride = a_stride, g.c = c, g.c_stride = c_stride;
    g.b = call.packed + l.weight, g.bias = call.packed + l.bias;
    g.rows = rows.count(), g.columns = l.rows, g.depth = l.depth, g.tokens = rows.tokens;
    return g;
  }

  Norm norm(int64_t shift, int64_t scale) const {
    Norm n;
    n.x = stream(), n.out = normed(), n.stride = stride;
    n.mul = modulation(scale), n.add = modulation(shift), n.mul_step = modulation_step();
    n.tokens = rows.tokens, n.width = d.hidden, n.eps = 1e-6f;
    return n;
  }

  void normalise(const Norm& n) const {
    shared(rows.count(), double(rows.count()) * n.width,
           [&](int64_t begin, int64_t end) { norm_rows(n, begin, end); });
  }

  Quantized quantized(const Gemm& g) const {
    auto* zeros = reinterpret_cast<int32_t*>(memory + space.zeros) + row;
    auto* words = reinterpret_cast<uint32_t*>(memory + space.words) + row * space.words_stride;
    return {g.a, g.a_stride, g.depth, words, space.words_stride, memory + space.scales + row, zeros};
  }

  // g of the Linear, behind a normalisation if there is one: in 8 bits where the Linear is.
  void run(Part part, const Linear& l, Gemm g, const Norm* n = nullptr) {
    const int64_t begun = work_done;
    work_done += l.rows * l.depth;
    g.beside = all_beside.part(begun, work_done, std::max(work, work_done));
    if (!l.group) {
      if (n) timed(Part::norm, [&] { normalise(*n); });
      return timed(part, [&] { multiply(g); });
    }
    const Quantized q = quantized(g);
    const auto prepare = [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        if (n) norm_rows(*n, i, i + 1);
        quantize_rows(q, i, i + 1);
      }
    };
    timed(Part::norm, [&] { shared(rows.count(), 4.0 * rows.count() * g.depth, prepare); });
    const float* packed = call.packed;
    const GemmInt8 product{g, q, reinterpret_cast<const int32_t*>(packed + l.weight), packed + l.scale,
                           reinterpret_cast<const int32_t*>(packed + l.sums)};
    timed(part, [&] { multiply(product); });
  }

  // stream += gate·Linear(a)
  void branch(Part part, const Linear& l, const float* a, int64_t a_stride, int64_t gate) {
    Gemm g = gemm(l, a, a_stride, stream(), stride);
    g.epilogue = Epilogue::gate, g.row = modulation(gate), g.row_step = modulation_step();
    run(part, l, g);
  }

  void embed() const {
    gather_patches(d, call.x, rows, wide(), space.wide_stride);
    Gemm g = gemm(layout.patch, wide(), space.wide_stride, stream(), stride);
    g.bias = nullptr;
    g.epilogue = Epilogue::add, g.row_step = padded(d.hidden);
    g.row = call.packed + layout.positions + rows.token * g.row_step;
    multiply(g);
  }

  void begin_block(int64_t index) {
    const Linear& qkv = layout.blocks[PackedLayout::kPerBlock * index];
    const Norm before = norm(6 * index, 6 * index + 1);
    float* to = keys(index) + rows.token * space.wide_stride;
    run(Part::qkv, qkv, gemm(qkv, normed(), stride, to, space.wide_stride), &before);
  }

  void finish_block(int64_t index) {
    const Linear* l = &layout.blocks[PackedLayout::kPerBlock * index];
    const int64_t first = 6 * index, wide_stride = space.wide_stride;
    Attention a{keys(index), wide_stride, normed(), stride, d.tokens(), d.heads, d.hidden / d.heads,
                rows.token, rows.tokens};
    timed(Part::attention, [&] { attend(a, rows.samples()); });
    branch(Part::proj, l[1], normed(), stride, first + 2);
    const Norm between = norm(first + 3, first + 4);
    Gemm g = gemm(l[2], normed(), stride, wide(), wide_stride);
    g.epilogue = Epilogue::gelu;
    run(Part::fc1, l[2], g, &between);
    branch(Part::fc2, l[3], wide(), wide_stride, first + 5);
  }

  void finish() {
    const Norm last = norm(6 * d.depth, 6 * d.depth + 1);
    run(Part::last, layout.last,
        gemm(layout.last, normed(), stride, wide(), space.wide_stride), &last);
    timed(Part::last, [&] { scatter_pixels(d, wide(), space.wide_stride, rows, call.image); });
  }
};

}  // namespace fastdit
