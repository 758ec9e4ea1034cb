// Direct calls: from Python's objects to a kernel, without PyTorch's dispatcher.
//
// At 2×16×192 the arithmetic of adaln takes a microsecond, the dispatcher's way to it (boxing
// eight arguments and three results) five. A direct call reads the tensors through DLPack's exchange
// table, 50 ns each, and asks PyTorch for the result alone. It runs only where nobody could tell the
// difference: plain CPU tensors of the dtypes and shapes that the op allows, nothing to
// differentiate, no mode, transform, trace or profiler that wants to see the op. Otherwise it
// returns None, having done nothing, and the ordinary call follows.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <cstring>
#include <initializer_list>

#include "cpu/adaln.h"
#include "cpu/bias_gelu.h"
#include "cpu/gated_residual.h"
#include "cpu/parallel.h"
#include "dlpack.h"
#include "python.h"

namespace fastdit {
namespace {

Python python;
const dlpack::ExchangeApi* exchange;

// What Python hands over once, in this order; fastdit/native_kernels/direct.py.
struct Constants {
  PyObject *none, *yes, *no, *layer, *rms;
  PyObject *tensor, *parameter, *empty_like;
  PyObject *requires_grad, *is_neg;                 // attribute names
  PyObject *forward_ad, *level_name, *level_value;  // module, attribute, its value outside
  PyObject* queries;  // ((function, its result where nothing watches), ...)
} constants;

PyObject* refuse() {
  python.PyErr_Clear();
  python.Py_IncRef(constants.none);
  return constants.none;
}

// `result` is a new reference or null, and is dropped.
bool is(PyObject* result, PyObject* wanted) {
  if (result) python.Py_DecRef(result);
  return result == wanted;
}

bool unobserved() {
  for (long i = 0; i < python.PyTuple_Size(constants.queries); ++i) {
    PyObject* query = python.PyTuple_GetItem(constants.queries, i);
    PyObject* function = python.PyTuple_GetItem(query, 0);
    if (!is(python.PyObject_CallFunctionObjArgs(function, nullptr),
            python.PyTuple_GetItem(query, 1)))
      return false;
  }
  return is(python.PyObject_GetAttr(constants.forward_ad, constants.level_name),
            constants.level_value);
}

// A plain CPU tensor that nobody differentiates, of one of the kernels' dtypes.
struct Operand {
  dlpack::Tensor t;
  Type type = Type::f32;

  bool read(PyObject* object) {
    PyObject* kind = python.PyObject_Type(object);
    const bool plain = kind == constants.tensor || kind == constants.parameter;
    python.Py_DecRef(kind);
    if (!plain || exchange->dltensor_from_py_object_no_sync(object, &t)) return false;
    if (t.device_type != dlpack::kCpu || t.lanes != 1) return false;
    if (t.code == dlpack::kFloat && t.bits == 32)
      type = Type::f32;
    else if (t.code == dlpack::kFloat && t.bits == 16)
      type = Type::f16;
    else if (t.code == dlpack::kBfloat && t.bits == 16)
      type = Type::bf16;
    else
      return false;
    if (aoti_torch_grad_mode_is_enabled() &&
        !is(python.PyObject_GetAttr(object, constants.requires_grad), constants.no))
      return false;
    return is(python.PyObject_CallMethodObjArgs(object, constants.is_neg, nullptr), constants.no);
  }
  bool has_shape(std::initializer_list<int64_t> shape) const {
    return t.ndim == int32_t(shape.size()) &&
           !std::memcmp(t.shape, shape.begin(), shape.size() * sizeof(int64_t));
  }
  void* data() const { return static_cast<char*>(t.data) + t.byte_offset; }
  int64_t size(int32_t axis) const { return t.shape[axis]; }
  bool contiguous() const {
    int64_t stride = 1;
    for (int32_t axis = t.ndim; axis-- > 0; stride *= t.shape[axis])
      if (t.shape[axis] != 1 && t.strides[axis] != stride) return false;
    return true;
  }
  int64_t count() const {
    int64_t count = 1;
    for (int32_t axis = 0; axis < t.ndim; ++axis) count *= t.shape[axis];
    return count;
  }
  Rows rows() const { return {data(), type, t.strides[0], t.strides[1]}; }
};

// x (B, N, D), not empty and contiguous, whose result is to be like it.
bool read_stream(PyObject* object, Operand& x) {
  return x.read(object) && x.t.ndim == 3 && x.count() && x.contiguous();
}

bool read_modulation(PyObject* object, const Operand& x, Modulation& to) {
  if (object == constants.none) return true;
  Operand m;
  if (!m.read(object)) return false;
  const int64_t* strides = m.t.strides;
  if (m.has_shape({x.size(0), x.size(2)}))
    to = {m.data(), m.type, strides[0], 0, strides[1]};
  else if (m.has_shape({x.size(0), x.size(1), x.size(2)}))
    to = {m.data(), m.type, strides[0], strides[1], strides[2]};
  else
    return false;
  return true;
}

bool read_parameter(PyObject* object, int64_t width, Modulation& to) {
  if (object == constants.none) return true;
  Operand p;
  if (!p.read(object) || !p.has_shape({width})) return false;
  to = {p.data(), p.type, 0, 0, p.t.strides[0]};
  return true;
}

// shift, scale, weight, bias, eps, norm, plus_one
bool read_options(PyObject* const* o, const Operand& x, Adaln& a) {
  const int64_t width = x.size(2);
  if (!read_modulation(o[0], x, a.shift) || !read_modulation(o[1], x, a.scale) ||
      !read_parameter(o[2], width, a.weight) || !read_parameter(o[3], width, a.bias))
    return false;
  a.rms = o[5] == constants.rms;
  if ((!a.rms && o[5] != constants.layer) || (o[6] != constants.yes && o[6] != constants.no))
    return false;
  if (a.bias && (a.rms || !a.weight)) return false;
  if ((a.weight && a.weight.type != x.type) || (a.bias && a.bias.type != x.type)) return false;
  const double eps = python.PyFloat_AsDouble(o[4]);
  if (!(eps >= 0) || python.PyErr_Occurred()) return false;
  a.eps = float(eps), a.plus = o[6] == constants.yes ? 1 : 0;
  a.x = x.rows(), a.tokens = x.size(1), a.width = width;
  return true;
}

// A new tensor like the one behind `x`, and its address; null where PyTorch refuses.
PyObject* new_like(PyObject* x, void*& data) {
  PyObject* out = python.PyObject_CallFunctionObjArgs(constants.empty_like, x, nullptr);
  dlpack::Tensor t;
  if (out && exchange->dltensor_from_py_object_no_sync(out, &t)) {
    python.Py_DecRef(out);
    return nullptr;
  }
  if (out) data = t.data;
  return out;
}

// f() without the interpreter's lock, where it takes long enough for another thread to care.
template <class F>
void unlocked(int64_t elements, const F& f) {
  if (elements <= kGrain) return f();
  void* state = python.PyEval_SaveThread();
  f();
  python.PyEval_RestoreThread(state);
}

void run_rows(const Adaln& a, int64_t batch) {
  unlocked(batch * a.tokens * a.width, [&] { adaln_all(a, batch); });
}

PyObject* adaln(PyObject*, PyObject* const* o, long count) {
  Operand x;
  Adaln a;
  if (count != 8 || !read_stream(o[0], x) || !read_options(o + 1, x, a) || !unobserved())
    return refuse();
  PyObject* out = new_like(o[0], a.out);
  if (!out) return refuse();
  run_rows(a, x.size(0));
  return out;
}

// y (B, N, D) with dense rows, and a gate.
bool read_branch(PyObject* const* o, const Operand& x, Operand& y, Modulation& gate) {
  return y.read(o[0]) && y.has_shape({x.size(0), x.size(1), x.size(2)}) &&
         (y.t.strides[2] == 1 || y.size(2) == 1) && o[1] != constants.none &&
         read_modulation(o[1], x, gate);
}

PyObject* gated_adaln(PyObject*, PyObject* const* o, long count) {
  Operand x, y;
  Adaln a;
  if (count != 10 || !read_stream(o[0], x) || !read_branch(o + 1, x, y, a.gate) ||
      !read_options(o + 3, x, a) || !unobserved())
    return refuse();
  a.y = y.rows();
  PyObject *h = new_like(o[0], a.h), *out = h ? new_like(o[0], a.out) : nullptr;
  if (!out) {
    if (h) python.Py_DecRef(h);
    return refuse();
  }
  run_rows(a, x.size(0));
  PyObject* both = python.PyTuple_Pack(2, h, out);
  python.Py_DecRef(h);
  python.Py_DecRef(out);
  return both;
}

PyObject* gated_residual(PyObject*, PyObject* const* o, long count) {
  Operand x, y;
  GatedResidual a;
  if (count != 3 || !read_stream(o[0], x) || !read_branch(o + 1, x, y, a.gate) || !unobserved())
    return refuse();
  PyObject* out = new_like(o[0], a.out);
  if (!out) return refuse();
  a.x = x.rows(), a.y = y.rows(), a.tokens = x.size(1), a.width = x.size(2);
  unlocked(x.count(), [&] { gated_residual_all(a, x.size(0)); });
  return out;
}

PyObject* bias_gelu(PyObject*, PyObject* const* o, long count) {
  Operand x;
  BiasGelu a;
  if (count != 2 || !x.read(o[0]) || x.t.ndim < 1 || x.t.ndim > 8 || !x.count() || !x.contiguous())
    return refuse();
  a.width = x.size(x.t.ndim - 1);
  if (o[1] == constants.none || !read_parameter(o[1], a.width, a.bias) || !unobserved())
    return refuse();
  PyObject* out = new_like(o[0], a.out);
  if (!out) return refuse();
  a.x = x.data(), a.type = x.type;
  unlocked(8 * x.count(), [&] { bias_gelu_all(a, x.count() / a.width); });
  return out;
}

PythonMethod methods[] = {
    {"adaln", adaln, kFastCall, nullptr},
    {"gated_adaln", gated_adaln, kFastCall, nullptr},
    {"gated_residual", gated_residual, kFastCall, nullptr},
    {"bias_gelu", bias_gelu, kFastCall, nullptr},
};

}  // namespace
}  // namespace fastdit

// The direct call of the op `name`, a new reference, or None where this process allows none.
// `given` is a tuple of the `Constants`, which it keeps; `capsule` is PyTorch's exchange table.
extern "C" __attribute__((visibility("default"))) PyObject* fastdit_direct_call(
    const char* name, PyObject* given, PyObject* capsule) {
  using namespace fastdit;
  if (!python.find()) return nullptr;
  python.Py_IncRef(given);
  PyObject** const fields = reinterpret_cast<PyObject**>(&constants);
  for (long i = 0; i < python.PyTuple_Size(given); ++i)
    fields[i] = python.PyTuple_GetItem(given, i);
  exchange = static_cast<const dlpack::ExchangeApi*>(
      python.PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (!exchange || exchange->major != dlpack::kMajor || !exchange->dltensor_from_py_object_no_sync)
    return refuse();
  for (PythonMethod& method : methods)
    if (!std::strcmp(method.name, name))
      return python.PyCFunction_NewEx(&method, nullptr, nullptr);
  return refuse();
}
