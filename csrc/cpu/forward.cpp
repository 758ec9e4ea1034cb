// The native forward: a whole DiT in inference, one call.
//
// Between the products the residual stream is read and written by their epilogues alone: `x +=
// gate·(a·W + bias)` as a tile leaves its registers. What a product costs is then its arithmetic and
// one pass over its weights. docs/native_forward.md has the figures.
#include "cpu/forward_body.h"

namespace fastdit {
namespace {

int64_t forward_workspace(std::vector<int64_t> numbers, int64_t batch, bool int8) {
  const Dit d = dit_of(numbers);
  return Shares(d, batch, group_of(int8)).floats(d, group_of(int8)) + 16;
}

// All samples of a call, each as `shares` has it: in a job, a part of its tokens, or all together.
void run(const Call& call, const Shares& shares, int64_t batch, int64_t group, float* memory,
         double* seconds) {
  constexpr int64_t kParts = int64_t(Part::kCount);
  const Dit& d = call.d;
  const int64_t slot_floats = shares.slot(d, group);
  const auto whole = [&](Span rows, int64_t slot) {
    if (!rows.samples()) return;
    const Workspace space(d, rows.samples(), group, 1);
    Forward f(call, space, memory + slot * slot_floats, rows.begin, rows,
              seconds ? seconds + slot * kParts : nullptr);
    f.prepare();
    for (int64_t i = 0; i < f.stages(); ++i) f.stage(i, 0, 1);
  };
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, shares.slots, 1, [&](int64_t slot, int64_t) {
    const Alone alone;
    for (int64_t job; (job = next++) < shares.jobs;) whole(shares.job(d, job), slot);
  });
  const Span rest{shares.alone, batch, 0, d.tokens()};
  if (shares.parts == 1) return whole(rest, 0);
  const Workspace space(d, shares.together, group, shares.parts);
  const auto part = [&](Span rows, int64_t slot) {
    return Forward(call, space, memory, shares.alone, rows,
                   seconds ? seconds + slot * kParts : nullptr);
  };
  part(rest, 0).prepare();
  in_stages(d.depth + 1, shares.together * shares.parts, [&](int64_t stage, int64_t item, int64_t slot) {
    part(shares.part(d, item), slot).stage(stage, item % shares.parts, shares.parts);
  });
}

Tensor forward_of(const Tensor& x, const Tensor* conditioning, const ModulationWeights& modulation,
                  const Tensor& packed, const Tensor& workspace, const Dit& d, bool int8,
                  const MaybeTensor& seconds) {
  const int64_t group = group_of(int8);
  const int64_t batch = x.dim() ? x.size(0) : 0;
  check_shape(x, {batch, d.channels, d.height, d.width}, "x");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_cpu(), "x: must be float32");
  const PackedLayout layout(d, group);
  const float* weights = floats_of(packed, {layout.floats}, "packed");
  STD_TORCH_CHECK(weights[0] == float(panel()) && weights[1] == float(group),
                  "packed: for another instruction set");
  const Shares shares(d, batch, group);
  STD_TORCH_CHECK(workspace.numel() >= shares.floats(d, group) + 16, "workspace: too small");
  floats_of(workspace, {workspace.numel()}, "workspace");
  Tensor out = empty({batch, d.out_channels, d.height, d.width}, ScalarType::Float);
  if (batch == 0) return out;
  const auto address = reinterpret_cast<uintptr_t>(workspace.data_ptr());
  float* memory = reinterpret_cast<float*>((address + 63) / 64 * 64);
  double* spent = nullptr;
  if (seconds) {
    STD_TORCH_CHECK(seconds->scalar_type() == ScalarType::Double && seconds->is_cpu() &&
                        seconds->is_contiguous(), "seconds: must be a contiguous float64 CPU tensor");
    check_shape(*seconds, {threads(), int64_t(Part::kCount)}, "seconds");
    spent = static_cast<double*>(seconds->data_ptr());
  }
  run({d, layout, weights, x, modulation, conditioning, static_cast<float*>(out.data_ptr())}, shares,
      batch, group, memory, spent);
  return out;
}

// `seconds`, if given: processor time of each part is added to it, (threads, 8) in float64.
Tensor forward(const Tensor& x, const Tensor& conditioning, const Tensor& packed,
               const Tensor& workspace, std::vector<int64_t> numbers, bool int8,
               MaybeTensor seconds) {
  const Dit d = dit_of(numbers);
  check_shape(conditioning, {x.dim() ? x.size(0) : 0, d.modulations()}, "conditioning");
  STD_TORCH_CHECK(conditioning.scalar_type() == ScalarType::Float && conditioning.is_cpu() &&
                      conditioning.stride(1) == 1, "conditioning: must be dense rows of float32");
  return forward_of(x, &conditioning, {}, packed, workspace, d, int8, seconds);
}

// The same of timesteps and labels, by the arguments of `forward_conditioning`.
Tensor forward_labelled(const Tensor& x, const Tensor& t, const Tensor& y, const Tensor& frequencies,
                        std::vector<Tensor> embedder, std::vector<Tensor> weights,
                        std::vector<Tensor> biases, const Tensor& packed, const Tensor& workspace,
                        std::vector<int64_t> numbers, bool int8) {
  const Dit d = dit_of(numbers);
  const Conditioner made(t, y, frequencies, embedder);
  STD_TORCH_CHECK(made.rows() == x.size(0) && made.width() == d.hidden, "t: wrong length");
  STD_TORCH_CHECK(int64_t(weights.size()) == d.depth + 1 && weights.size() == biases.size(),
                  "weights: wrong number");
  ModulationWeights modulation{made.c(), {}, {}};
  for (int64_t layer = 0; layer <= d.depth; ++layer) {
    const int64_t columns = ModulationWeights::columns(d, layer);
    modulation.weights.push_back(floats_of(weights[layer], {columns, d.hidden}, "weight"));
    modulation.biases.push_back(floats_of(biases[layer], {columns}, "bias"));
  }
  return forward_of(x, nullptr, modulation, packed, workspace, d, int8, {});
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
  m.def(
      "forward_labelled(Tensor x, Tensor t, Tensor y, Tensor frequencies, Tensor[] embedder, "
      "Tensor[] weights, Tensor[] biases, Tensor packed, Tensor workspace, int[] dit, bool int8) -> "
      "Tensor");
  m.def("multiply_adds(int steps) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(fastdit_native, CPU, m) {
  m.impl("forward", TORCH_BOX(&fastdit::forward));
  m.impl("forward_labelled", TORCH_BOX(&fastdit::forward_labelled));
}
STABLE_TORCH_LIBRARY_IMPL(fastdit_native, CompositeExplicitAutograd, m) {
  m.impl("forward_workspace", TORCH_BOX(&fastdit::forward_workspace));
  m.impl("multiply_adds", TORCH_BOX(&fastdit::multiply_adds));
}
