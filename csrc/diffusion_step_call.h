// From the op's arguments to a StepCall: the checks, the copies of strided tensors, the results.
//
// fastdit.ops.diffusion_step has checked the arguments already; whoever calls
// torch.ops.fastdit_native directly gets the same messages from here. Strided tensors are made
// contiguous here, so that the common call pays for it with one question a tensor.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "diffusion_step.h"

namespace fastdit {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// The tensors that a StepCall points into, and the call.
struct Step {
  Tensor x, output, table, step;
  std::optional<Tensor> noise, previous, seed, next, x0;
  StepCall call = {};
};

// ---- messages: "name: got ..., allowed is ..." --------------------------------------------------

inline std::string text(const Sizes& sizes) {
  std::ostringstream out;
  out << '(';
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  out << (sizes.size() == 1 ? ",)" : ")");
  return out.str();
}

inline Sizes sizes_of(const Tensor& tensor) {
  const auto sizes = tensor.sizes();
  return Sizes(sizes.begin(), sizes.end());
}

inline const char* text(ScalarType type) {
  switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    default: return "another dtype";
  }
}

inline std::string text(const Tensor& tensor) {
  const bool cpu = tensor.is_cpu();
  const std::string place = cpu ? "cpu" : "cuda:" + std::to_string(tensor.get_device_index());
  return text(sizes_of(tensor)) + " " + text(tensor.scalar_type()) + " on " + place;
}

[[noreturn]] inline void fail(const char* name, const std::string& got,
                              const std::string& allowed) {
  throw std::runtime_error(std::string(name) + ": got " + got + ", allowed is " + allowed);
}

// ---- checks -------------------------------------------------------------------------------------

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  return a.sizes() == b.sizes();
}

inline bool same_device(const Tensor& a, const Tensor& b) {
  return a.device() == b.device();
}

inline Storage storage_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Storage::kFloat;
    case ScalarType::BFloat16: return Storage::kBFloat16;
    case ScalarType::Half: return Storage::kHalf;
    default: fail(name, text(tensor), "float32, bfloat16 or float16");
  }
}

inline const void* like_x(const char* name, std::optional<Tensor>& tensor, const Tensor& x) {
  if (!tensor) return nullptr;
  const bool fits = same_sizes(*tensor, x) && tensor->scalar_type() == x.scalar_type();
  if (!fits || !same_device(*tensor, x)) fail(name, text(*tensor), text(x));
  if (!tensor->is_contiguous()) tensor = torch::stable::contiguous(*tensor);
  return tensor->const_data_ptr();
}

// An int64 tensor () or (B,): its data, and its stride over samples.
inline const int64_t* per_sample(const char* name, Tensor& tensor, const Tensor& x,
                                 int32_t& stride) {
  const int64_t dim = tensor.dim(), batch = x.size(0);
  const bool fits = dim == 0 || (dim == 1 && tensor.size(0) == batch);
  if (!fits || tensor.scalar_type() != ScalarType::Long || !same_device(tensor, x)) {
    const std::string shapes = "() or (" + std::to_string(batch) + ",)";
    fail(name, text(tensor), "an int64 tensor " + shapes + " on x's device");
  }
  stride = int32_t(dim);
  if (!tensor.is_contiguous()) tensor = torch::stable::contiguous(tensor);
  return static_cast<const int64_t*>(tensor.const_data_ptr());
}

// The model's output as an image, or as token rows whose pixels are x's.
inline void take_output(Step& step, bool learned, int64_t guided,
                        const std::optional<Sizes>& patch) {
  const Tensor &x = step.x, &output = step.output;
  StepCall& call = step.call;
  const int64_t batch = guided ? 2 * call.batch : call.batch, channels = call.channels;
  if (guided < 0 || guided > 2 * channels) {
    fail("guided_channels", std::to_string(guided), "0 to " + std::to_string(2 * channels));
  }
  Sizes expected = sizes_of(x);
  expected[0] = batch;
  size_t axis = 1;
  int64_t pixels = 1;
  if (patch) {
    const Sizes& p = *patch;
    bool fits = p.size() + 2 == expected.size() && (p.size() == 1 || p.size() == 2);
    for (size_t i = 0; fits && i < p.size(); ++i) {
      fits = p[i] > 0 && expected[2 + i] % p[i] == 0;
      pixels *= p[i];
    }
    if (!fits) fail("patch", text(p), "one or two positive ints that divide the sizes of x");
    expected = {batch, call.plane / pixels, channels * pixels};
    axis = 2;
    call.width = int32_t(x.size(x.dim() - 1));
    call.patch_h = p.size() == 2 ? int32_t(p[0]) : 1;
    call.patch_w = int32_t(p.back());
  }
  Sizes sizes = sizes_of(output), doubled = expected;
  doubled[axis] *= 2;
  const bool fits = sizes == doubled || (!learned && sizes == expected);
  if (!fits || !same_device(output, x)) {
    const std::string allowed = (learned ? "" : text(expected) + " or ") + text(doubled);
    fail("model_output", text(output), allowed + " on x's device");
  }
  call.output_channels = sizes[axis] / pixels;
  call.learned = learned;
  call.guided = guided;
  if (call.tokens() && call.output_size() > std::numeric_limits<int32_t>::max()) {
    fail("model_output", text(output), "token rows of less than 2^31 elements a sample");
  }
  call.output_storage = storage_of("model_output", output);
  if (!output.is_contiguous()) step.output = torch::stable::contiguous(output);
  call.output = step.output.const_data_ptr();
}

inline void take_table(Step& step) {
  const Tensor &x = step.x, &table = step.table;
  const bool fits = table.dim() == 2 && table.size(1) == 9;
  if (!fits || table.scalar_type() != ScalarType::Float || !same_device(table, x)) {
    fail("table", text(table), "(steps, 9) float32 on x's device");
  }
  if (!table.is_contiguous()) step.table = torch::stable::contiguous(table);
  step.call.table = static_cast<const StepRow*>(step.table.const_data_ptr());
  step.call.rows = table.size(0);
}

// Contiguous and uninitialised; without the dispatcher that torch::stable::empty_like goes through.
inline Tensor empty_like_contiguous(const Tensor& x) {
  const auto sizes = x.sizes();
  Sizes strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) {
    strides[i - 1] = strides[i] * (sizes[i] > 1 ? sizes[i] : 1);
  }
  int32_t type, device, index;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(x.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(x.get(), &index));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.data(), strides.data(), type, device, index, &handle));
  return Tensor(handle);
}

inline Step prepare(const Tensor& x, const Tensor& output, const Tensor& table, const Tensor& index,
                    const std::optional<Tensor>& noise, const std::optional<Tensor>& previous,
                    std::optional<double> clip, bool learned, int64_t guided,
                    const std::optional<Tensor>& seed, const std::optional<Sizes>& patch) {
  Step step{x, output, table, index, noise, previous, seed};
  StepCall& call = step.call;
  if (x.dim() < 2 || x.dim() > 5) fail("x", text(x), "(B, C, ...) of 2 to 5 axes");
  call.x_storage = storage_of("x", x);
  call.batch = x.size(0);
  call.channels = x.size(1);
  call.plane = 1;
  for (int64_t axis = 2; axis < x.dim(); ++axis) call.plane *= x.size(axis);
  if (!x.is_contiguous()) step.x = torch::stable::contiguous(x);
  call.x = step.x.const_data_ptr();
  take_output(step, learned, guided, patch);
  take_table(step);
  call.step = per_sample("step", step.step, x, call.step_per_sample);
  call.noise = like_x("noise", step.noise, x);
  call.previous = like_x("x0_previous", step.previous, x);
  if (seed) {
    if (noise) fail("seed", "a seed and a noise", "one of them");
    call.seed = per_sample("seed", *step.seed, x, call.seed_per_sample);
  }
  if (clip && !(*clip > 0)) fail("clip", std::to_string(*clip), "None or a number > 0");
  call.clip = clip ? float(*clip) : std::numeric_limits<float>::infinity();
  return step;
}

// New results.
inline void make_results(Step& step) {
  step.next = empty_like_contiguous(step.x), step.x0 = empty_like_contiguous(step.x);
  step.call.next = step.next->mutable_data_ptr(), step.call.x0 = step.x0->mutable_data_ptr();
}

// The given ones; without `x0` it is not written.
inline void take_results(Step& step, Tensor& next, std::optional<Tensor>& x0) {
  const auto taken = [&](const char* name, Tensor& tensor) {
    const bool fits = same_sizes(tensor, step.x) && tensor.scalar_type() == step.x.scalar_type();
    if (!fits || !same_device(tensor, step.x) || !tensor.is_contiguous()) {
      fail(name, text(tensor), text(step.x) + ", contiguous");
    }
    return tensor.mutable_data_ptr();
  };
  step.call.next = taken("next", next);
  step.call.x0 = x0 ? taken("x0", *x0) : nullptr;
}

}  // namespace fastdit
