// The direct call of diffusion_step.
#include <limits>

#include "cpu/diffusion_step_chunks.h"
#include "cpu/direct.h"

namespace fastdit::direct {
namespace {

Storage storage_of(Type type) {
  return type == Type::f32   ? Storage::kFloat
         : type == Type::f16 ? Storage::kHalf
                             : Storage::kBFloat16;
}

// An int64 tensor () or (B,), or an int, which is kept at `place`.
bool read_index(PyObject* object, int64_t batch, int64_t& place, const int64_t*& to,
                int32_t& stride, Inputs& inputs) {
  Operand index;
  if (read_int(object, place)) {
    to = &place, stride = 0;
    return true;
  }
  if (!plain(object, index.t) || index.t.code != dlpack::kInt || index.t.bits != 64) return false;
  const bool each = index.t.ndim == 1 && index.size(0) == batch;
  if ((index.t.ndim && !each) || !index.contiguous()) return false;
  inputs.add(index.t);
  to = static_cast<const int64_t*>(index.data()), stride = each;
  return true;
}

// A tensor like x, or None.
bool read_like(PyObject* object, const Operand& x, const void*& to, Inputs& inputs) {
  if (object == constants.none) return true;
  Operand t;
  if (!t.read(object) || !t.same_as(x) || !t.contiguous()) return false;
  inputs.add(t.t, true);
  to = t.data();
  return true;
}

bool read_table(PyObject* object, StepCall& call, Inputs& inputs) {
  Operand table;
  if (!table.read(object) || table.type != Type::f32 || table.t.ndim != 2 || table.size(1) != 9 ||
      !table.contiguous())
    return false;
  inputs.add(table.t);
  call.table = static_cast<const StepRow*>(table.data()), call.rows = table.size(0);
  return true;
}

// Samples of C or 2C channels, as an image like x or as token rows of its patches.
bool read_output(PyObject* object, PyObject* patch, const Operand& x, StepCall& call,
                 Inputs& inputs) {
  Operand output;
  if (!output.read(object) || !output.contiguous()) return false;
  inputs.add(output.t);
  const int32_t axes = x.t.ndim - 2;
  const int64_t batch = call.guided ? 2 * call.batch : call.batch;
  int64_t pixels = 1, got;
  if (patch == constants.none) {
    if (output.t.ndim != x.t.ndim || output.size(0) != batch ||
        std::memcmp(output.t.shape + 2, x.t.shape + 2, axes * sizeof(int64_t)))
      return false;
    got = output.size(1);
  } else {
    int64_t sizes[2] = {1, 1};
    if (!read_sizes(patch, axes, sizes)) return false;
    for (int32_t i = 0; i < axes; ++i) {
      if (sizes[i] < 1 || x.size(2 + i) % sizes[i]) return false;
      pixels *= sizes[i];
    }
    if (output.t.ndim != 3 || output.size(0) != batch || output.size(1) != call.plane / pixels)
      return false;
    call.width = int32_t(x.size(x.t.ndim - 1));
    call.patch_h = axes == 2 ? int32_t(sizes[0]) : 1, call.patch_w = int32_t(sizes[axes - 1]);
    got = output.size(2);
  }
  if (got != 2 * call.channels * pixels && (call.learned || got != call.channels * pixels))
    return false;
  call.output = output.data(), call.output_storage = storage_of(output.type);
  call.output_channels = got / pixels;
  return !call.tokens() || call.output_size() <= std::numeric_limits<int32_t>::max();
}

bool read_clip(PyObject* object, float& clip) {
  clip = std::numeric_limits<float>::infinity();
  if (object == constants.none) return true;
  const double value = python.PyFloat_AsDouble(object);
  clip = float(value);
  return value > 0 && !python.PyErr_Occurred();
}

}  // namespace

// x, model_output, table, step, noise, x0_previous, clip, learned_range, guided_channels, seed,
// patch; then, or not, the given results and whether x0 is one
PyObject* diffusion_step(PyObject*, PyObject* const* o, long count) {
  Operand x;
  Inputs inputs;
  Result next, x0;
  StepCall call = {};
  int64_t step, seed;
  if ((count != 11 && count != 13) || !x.read(o[0]) || x.t.ndim < 2 || x.t.ndim > 5 ||
      !x.count() || !x.contiguous())
    return refuse();
  inputs.add(x.t, true);
  call.x = x.data(), call.x_storage = storage_of(x.type);
  call.batch = x.size(0), call.channels = x.size(1);
  call.plane = x.count() / (call.batch * call.channels);
  call.learned = o[7] == constants.yes;
  if ((!call.learned && o[7] != constants.no) || !read_int(o[8], call.guided) ||
      call.guided < 0 || call.guided > 2 * call.channels)
    return refuse();
  if (!read_output(o[1], o[10], x, call, inputs) || !read_table(o[2], call, inputs) ||
      !read_index(o[3], call.batch, step, call.step, call.step_per_sample, inputs) ||
      !read_like(o[4], x, call.noise, inputs) || !read_like(o[5], x, call.previous, inputs) ||
      !read_clip(o[6], call.clip))
    return refuse();
  if (o[9] != constants.none &&
      (call.noise ||
       !read_index(o[9], call.batch, seed, call.seed, call.seed_per_sample, inputs)))
    return refuse();
  const bool wanted = count == 11 || o[12] == constants.yes;
  if ((!wanted && o[12] != constants.no) ||
      (count == 13 && !read_pair(o[11], o[0], x, inputs, next, x0)) ||
      (next.given() && x0.given() != wanted))
    return refuse();
  if (!steps_fit(call) || gradient_wanted || !unobserved()) return refuse();
  if (x0.given() && (python.Py_IncRef(o[11]), !written(o[11]))) return refuse();
  if (!x0.given() && !written(next)) return refuse();
  call.next = next.make(o[0], x);
  if (call.next && wanted) call.x0 = x0.make(o[0], x);
  if (!call.next || (wanted && !call.x0)) return refuse();
  unlocked(x.count(), [&] { diffusion_step_all(call); });
  if (wanted) return pair(next.release(), x0.release());
  python.Py_IncRef(constants.none);
  return pair(next.release(), constants.none);
}

}  // namespace fastdit::direct
