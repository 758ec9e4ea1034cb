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
Query queries[kQueries], is_negative, increment_version;
long query_count;

// A module's variable, which tells by its value whether something watches.
struct Global {
  PyObject *dictionary, *name, *wanted;
};
Global globals[kQueries];
long global_count;

Query query_of(PyObject* callable, PyObject* wanted) {
  Query query;
  query.callable = callable, query.wanted = wanted;
  const int flags = python.PyCFunction_GetFlags(callable);
  python.PyErr_Clear();  // it is no C function
  if (flags == kNoArguments || flags == kOneArgument)
    query.function = python.PyCFunction_GetFunction(callable);
  else if (flags == (kFastCall | kKeywords))
    query.with_keywords = reinterpret_cast<decltype(query.with_keywords)>(
        python.PyCFunction_GetFunction(callable));
  if (query.function || query.with_keywords) query.self = python.PyCFunction_GetSelf(callable);
  return query;
}

// Of a living object, whose type lives on without this reference.
const PyObject* type_of(PyObject* object) {
  PyObject* type = python.PyObject_Type(object);
  python.Py_DecRef(type);
  return type;
}

bool holds(const Query& query) {
  return is(query.function        ? query.function(query.self, nullptr)
            : query.with_keywords ? query.with_keywords(query.self, nullptr, 0, nullptr)
                                  : python.PyObject_CallFunctionObjArgs(query.callable, nullptr),
            query.wanted);
}

// Whether a tensor is negated lazily, as the imaginary part of a conjugate is. Every stride of such
// a view is even, a complex number's; asking PyTorch takes as long as all else about a tensor.
bool negative(PyObject* tensor, const dlpack::Tensor& t) {
  if (t.code == dlpack::kInt) return false;
  for (int32_t axis = t.ndim; axis-- > 0;)
    if (t.shape[axis] != 1 && t.strides[axis] % 2) return false;
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
    {"glu", glu, kFastCall, nullptr},
    {"unpatchify", unpatchify, kFastCall, nullptr},
    {"diffusion_step", diffusion_step, kFastCall, nullptr},
};

}  // namespace

bool unobserved() {
  for (long i = 0; i < query_count; ++i)
    if (!holds(queries[i])) return false;
  for (long i = 0; i < global_count; ++i)  // a borrowed reference
    if (python.PyDict_GetItemWithError(globals[i].dictionary, globals[i].name) != globals[i].wanted)
      return false;
  return true;
}

bool plain(PyObject* object, dlpack::Tensor& t) {
  const PyObject* kind = type_of(object);
  const bool fits = kind == constants.tensor || kind == constants.parameter;
  if (!fits || exchange->dltensor_from_py_object_no_sync(object, &t)) return false;
  if (t.device_type != dlpack::kCpu || t.lanes != 1) return false;
  if (!t.data) return false;  // empty, or another tensor's wrapper
  if (!gradient_wanted && aoti_torch_grad_mode_is_enabled())
    gradient_wanted = !is(python.PyObject_GetAttr(object, constants.requires_grad), constants.no);
  return !negative(object, t);
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

// ---- given results ----------------------------------------------------------------------------------

void Inputs::add(const dlpack::Tensor& t, bool replaceable) {
  int64_t last = 0;
  for (int32_t axis = 0; axis < t.ndim; ++axis) last += (t.shape[axis] - 1) * t.strides[axis];
  const char* begin = static_cast<const char*>(t.data) + t.byte_offset;
  spans_[count_++] = {begin, begin + (last + 1) * t.bits / 8, replaceable};
}

bool Inputs::allow(const Operand& result) const {
  const char *begin = static_cast<const char*>(result.data()), *end = begin + result.bytes();
  for (int i = 0; i < count_; ++i) {
    const Span& span = spans_[i];
    const bool apart = end <= span.begin || span.end <= begin;
    if (!apart && !(span.replaceable && span.begin == begin && span.end == end)) return false;
  }
  return true;
}

bool Result::read(PyObject* object, PyObject* x, const Operand& operand, const Inputs& inputs) {
  if (object == constants.none) return true;
  if (object == x)
    operand_ = operand;
  else if (!operand_.read(object) || !operand_.same_as(operand) || !operand_.contiguous())
    return false;
  object_ = object;
  return inputs.allow(operand_);
}

bool Result::apart_from(const Result& other) const {
  Inputs first;
  first.add(operand_.t);
  return first.allow(other.operand_);
}

void* Result::make(PyObject* x, const Operand& operand) {
  if (given()) return operand_.data();
  void* data = nullptr;
  made_ = new_like(x, operand, data);
  return data;
}

PyObject* Result::release() {
  PyObject* tensor = made_;
  if (given()) python.Py_IncRef(tensor = object_);
  made_ = nullptr;
  return tensor;
}

Result::~Result() {
  if (made_) python.Py_DecRef(made_);
}

bool written(PyObject* tensors) {
  if (!tensors) return false;
  PyObject* done = increment_version.function(increment_version.self, tensors);
  python.Py_DecRef(tensors);
  return is(done, constants.none);
}

bool read_pair(PyObject* object, PyObject* x, const Operand& operand, const Inputs& inputs,
               Result& first, Result& second) {
  if (object == constants.none) return true;
  return python.PyTuple_Size(object) == 2 &&
         first.read(python.PyTuple_GetItem(object, 0), x, operand, inputs) &&
         second.read(python.PyTuple_GetItem(object, 1), x, operand, inputs) &&
         first.given() && (!second.given() || first.apart_from(second));
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
  increment_version = query_of(constants.increment_version, constants.none);
  if (!is_negative.function || !increment_version.function) return refuse();
  query_count = python.PyTuple_Size(constants.queries);
  global_count = python.PyTuple_Size(constants.globals);
  if (query_count > kQueries || global_count > kQueries) return refuse();
  for (long i = 0; i < global_count; ++i) {
    PyObject* variable = python.PyTuple_GetItem(constants.globals, i);
    globals[i] = {python.PyTuple_GetItem(variable, 0), python.PyTuple_GetItem(variable, 1),
                  python.PyTuple_GetItem(variable, 2)};
  }
  for (long i = 0; i < query_count; ++i) {
    PyObject* query = python.PyTuple_GetItem(constants.queries, i);
    queries[i] = query_of(python.PyTuple_GetItem(query, 0), python.PyTuple_GetItem(query, 1));
  }
  for (PythonMethod& method : methods)
    if (!std::strcmp(method.name, name))
      return python.PyCFunction_NewEx(&method, nullptr, nullptr);
  return refuse();
}
