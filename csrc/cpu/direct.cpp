// What direct calls share: the questions to Python, the results, and the way into the library.
#include "cpu/direct.h"

namespace fastdit::direct {

Python python;
const dlpack::ExchangeApi* exchange;
Constants constants;
constinit thread_local bool gradient_wanted = false;

namespace {

constexpr long kQueries = 8;
constexpr int32_t kDims = 8;
Query queries[kQueries], is_negative;
long query_count;

Query query_of(PyObject* callable, PyObject* wanted) {
  Query query;
  query.callable = callable, query.wanted = wanted;
  if (python.PyCFunction_GetFlags(callable) == kNoArguments) {
    query.function = python.PyCFunction_GetFunction(callable);
    query.self = python.PyCFunction_GetSelf(callable);
  }
  python.PyErr_Clear();  // it is no C function
  return query;
}

// Of a living object, whose type lives on without this reference.
const PyObject* type_of(PyObject* object) {
  PyObject* type = python.PyObject_Type(object);
  python.Py_DecRef(type);
  return type;
}

bool holds(const Query& query) {
  return is(query.function ? query.function(query.self, nullptr)
                           : python.PyObject_CallFunctionObjArgs(query.callable, nullptr),
            query.wanted);
}

bool negative(PyObject* tensor) {
  Query query = is_negative;
  query.self = tensor;
  return !holds(query);
}

PyObject* ints(const int64_t* values, int32_t count) {
  PyObject* tuple = python.PyTuple_New(count);
  for (int32_t i = 0; tuple && i < count; ++i)
    python.PyTuple_SetItem(tuple, i, python.PyLong_FromLongLong(values[i]));
  return tuple;
}

// (sizes, strides, dtype) of a dense tensor, as Python objects.
PyObject* layout(const int64_t* shape, int32_t dims, Type type) {
  int64_t strides[kDims], stride = 1;
  for (int32_t axis = dims; axis-- > 0; stride *= shape[axis]) strides[axis] = stride;
  PyObject *sizes = ints(shape, dims), *steps = ints(strides, dims), *made = nullptr;
  PyObject* dtype = type == Type::f32   ? constants.float32
                    : type == Type::f16 ? constants.float16
                                        : constants.bfloat16;
  if (sizes && steps) made = python.PyTuple_Pack(3, sizes, steps, dtype);
  for (PyObject* one : {sizes, steps})
    if (one) python.Py_DecRef(one);
  return made;
}

// Layouts of the last few shapes: making one takes a fifth of the time of a small result.
struct Known {
  int64_t shape[kDims];
  int32_t dims;
  Type type;
  PyObject* layout;
};
constinit thread_local Known known[8] = {};

PyObject* empty_strided(const int64_t* shape, int32_t dims, Type type) {
  uint64_t mixed = uint64_t(type);
  for (int32_t axis = 0; axis < dims; ++axis) mixed = 31 * mixed + uint64_t(shape[axis]);
  Known& k = known[(mixed ^ mixed >> 7) % 8];
  if (!k.layout || k.dims != dims || k.type != type ||
      std::memcmp(k.shape, shape, dims * sizeof(int64_t))) {
    PyObject* made = layout(shape, dims, type);
    if (!made) return nullptr;
    if (k.layout) python.Py_DecRef(k.layout);
    k.dims = dims, k.type = type, k.layout = made;
    std::memcpy(k.shape, shape, dims * sizeof(int64_t));
  }
  return python.PyObject_CallObject(constants.empty_strided, k.layout);
}

PyObject* with_address(PyObject* tensor, void*& data) {
  dlpack::Tensor t;
  if (tensor && exchange->dltensor_from_py_object_no_sync(tensor, &t)) {
    python.Py_DecRef(tensor);
    return nullptr;
  }
  if (tensor) data = static_cast<char*>(t.data) + t.byte_offset;
  return tensor;
}

PythonMethod methods[] = {
    {"adaln", adaln, kFastCall, nullptr},
    {"gated_adaln", gated_adaln, kFastCall, nullptr},
    {"gated_residual", gated_residual, kFastCall, nullptr},
    {"bias_gelu", bias_gelu, kFastCall, nullptr},
    {"unpatchify", unpatchify, kFastCall, nullptr},
    {"diffusion_step", diffusion_step, kFastCall, nullptr},
};

}  // namespace

bool unobserved() {
  for (long i = 0; i < query_count; ++i)
    if (!holds(queries[i])) return false;
  return is(python.PyObject_GetAttr(constants.forward_ad, constants.level_name),
            constants.level_value);
}

bool plain(PyObject* object, dlpack::Tensor& t) {
  const PyObject* kind = type_of(object);
  const bool fits = kind == constants.tensor || kind == constants.parameter;
  if (!fits || exchange->dltensor_from_py_object_no_sync(object, &t)) return false;
  if (t.device_type != dlpack::kCpu || t.lanes != 1) return false;
  if (!gradient_wanted && aoti_torch_grad_mode_is_enabled())
    gradient_wanted = !is(python.PyObject_GetAttr(object, constants.requires_grad), constants.no);
  return !negative(object);
}

bool read_int(PyObject* object, int64_t& to) {
  if (type_of(object) != constants.integer) return false;
  to = python.PyLong_AsLongLong(object);
  return to != -1 || !python.PyErr_Occurred();
}

bool read_sizes(PyObject* object, int64_t count, int64_t (&to)[2]) {
  if (count < 1 || count > 2) return false;
  if (read_int(object, to[0])) return to[1] = to[0], true;
  if (python.PySequence_Size(object) != count) return false;
  for (long i = 0; i < count; ++i) {
    PyObject* item = python.PySequence_GetItem(object, i);
    const bool fits = item && read_int(item, to[i]);
    if (item) python.Py_DecRef(item);
    if (!fits) return false;
  }
  return true;
}

PyObject* new_tensor(const Operand& like, const int64_t* shape, int32_t dims, void*& data) {
  if (constants.empty_strided == constants.none || dims > kDims) return nullptr;
  return with_address(empty_strided(shape, dims, like.type), data);
}

PyObject* new_like(PyObject* x, const Operand& operand, void*& data) {
  if (constants.empty_strided != constants.none)
    return new_tensor(operand, operand.t.shape, operand.t.ndim, data);
  return with_address(python.PyObject_CallFunctionObjArgs(constants.empty_like, x, nullptr), data);
}

}  // namespace fastdit::direct

// The direct call of the op `name`, a new reference, or None where this process allows none.
// `given` is a tuple of the `Constants`, which it keeps; `capsule` is PyTorch's exchange table.
extern "C" __attribute__((visibility("default"))) PyObject* fastdit_direct_call(
    const char* name, PyObject* given, PyObject* capsule) {
  using namespace fastdit;
  using namespace fastdit::direct;
  if (!python.find()) return nullptr;
  python.Py_IncRef(given);
  PyObject** const fields = reinterpret_cast<PyObject**>(&constants);
  for (long i = 0; i < python.PyTuple_Size(given); ++i)
    fields[i] = python.PyTuple_GetItem(given, i);
  exchange = static_cast<const dlpack::ExchangeApi*>(
      python.PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
  if (!exchange || exchange->major != dlpack::kMajor || !exchange->dltensor_from_py_object_no_sync)
    return refuse();
  is_negative = query_of(constants.is_neg, constants.no);
  if (!is_negative.function) return refuse();
  query_count = python.PyTuple_Size(constants.queries);
  if (query_count > kQueries) return refuse();
  for (long i = 0; i < query_count; ++i) {
    PyObject* query = python.PyTuple_GetItem(constants.queries, i);
    queries[i] = query_of(python.PyTuple_GetItem(query, 0), python.PyTuple_GetItem(query, 1));
  }
  for (PythonMethod& method : methods)
    if (!std::strcmp(method.name, name))
      return python.PyCFunction_NewEx(&method, nullptr, nullptr);
  return refuse();
}
