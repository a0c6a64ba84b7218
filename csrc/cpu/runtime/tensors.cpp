#include "tensors.h"

#include <stdexcept>
#include <string>

#include "modes.h"

namespace py = pybind11;

namespace ctxkern {
namespace {

// What DLPack 1.x lays down of these, so that neither its header nor torch's is needed to build.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t ndim;
  uint8_t code, bits;
  uint16_t lanes;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* previous;
  void* other[3];
  int (*read)(void* object, DLTensor* out);
  void* stream;
};

constexpr uint8_t kInt = 0, kFloat = 2, kBfloat = 4;

// torch's tensors: their type, and the functions that read them.
struct Torch {
  Torch() {
    const auto module = py::module_::import("torch");
    py::object type = module.attr("Tensor");
    const py::object table = py::getattr(type, "__dlpack_c_exchange_api__", py::none());
    const auto* api = table.is_none() ? nullptr : table.cast<py::capsule>().get_pointer<ExchangeApi>();
    while (api && api->major > 1) api = api->previous;
    if (api == nullptr || api->major != 1 || api->read == nullptr)
      throw std::runtime_error("this torch has no table of DLPack 1.x for C; torch 2.11 and later have");
    tensor = reinterpret_cast<PyTypeObject*>(type.release().ptr());
    py::object derived = py::module_::import("torch.nn").attr("Parameter");
    parameter = reinterpret_cast<PyTypeObject*>(derived.release().ptr());
    is_neg = PyUnicode_InternFromString("is_neg");
    is_zero = PyUnicode_InternFromString("_is_zerotensor");
    like = py::object(module.attr("empty_like")).release().ptr();
    linear = py::object(py::module_::import("torch._C._nn").attr("linear")).release().ptr();
    matmul = py::object(module.attr("matmul")).release().ptr();
    contiguous = PyUnicode_InternFromString("contiguous");
    new_empty = PyUnicode_InternFromString("new_empty");
    sum = PyUnicode_InternFromString("sum");
    to = PyUnicode_InternFromString("to");
    dtype = PyUnicode_InternFromString("dtype");
    mT = PyUnicode_InternFromString("mT");
    is_cpu = PyUnicode_InternFromString("is_cpu");
    is_cuda = PyUnicode_InternFromString("is_cuda");
    read = api->read;
  }

  PyTypeObject *tensor, *parameter;
  PyObject *like, *linear, *matmul;
  PyObject *is_neg, *is_zero, *contiguous, *new_empty, *sum, *to;  // names of methods
  PyObject *is_cpu, *is_cuda, *dtype, *mT;                         // of attributes
  int (*read)(void* object, DLTensor* out);
};

// Set as the module is loaded, never dropped.
const Torch* known = nullptr;

const Torch& torch() { return *known; }

py::object made(PyObject* answer) {
  if (answer == nullptr) throw py::error_already_set();
  return py::reinterpret_steal<py::object>(answer);
}

bool is_true(PyObject* answer) { return made(answer).ptr() == Py_True; }

bool says(py::handle tensor, PyObject* method) { return is_true(PyObject_CallMethodNoArgs(tensor.ptr(), method)); }

bool has(py::handle tensor, PyObject* attribute) { return is_true(PyObject_GetAttr(tensor.ptr(), attribute)); }

[[noreturn]] void wrong_ndim(int64_t found, int64_t ndim) {
  throw std::invalid_argument("a tensor has " + std::to_string(found) + " dimensions; it must have " +
                              std::to_string(ndim));
}

}  // namespace

void find_torch() {
  if (known == nullptr) known = new Torch;
}

int64_t Tensor::bytes() const {
  int64_t found = bits / 8;
  for (int64_t i = 0; i < ndim; ++i) found *= sizes[i];
  return found;
}

bool Tensor::dense() const {
  int64_t stride = 1, gaps = 0;
  for (int64_t i = ndim - 1; i >= 0; --i) {
    if (sizes[i] == 0) return true;
    gaps += sizes[i] != 1 && strides[i] != stride;
    stride *= sizes[i];
  }
  return gaps == 0;
}

bool Tensor::floats() const { return kind == kFloat || (kind == kBfloat && bits == 16); }

bool Tensor::longs() const { return kind == kInt && bits == 64; }

bool Tensor::same_device(const Tensor& other) const {
  return device_type == other.device_type && device == other.device;
}

bool Tensor::has_sizes(std::initializer_list<int64_t> expected) const {
  if (ndim != static_cast<int64_t>(expected.size())) return false;
  const int64_t* at = sizes;
  for (const int64_t size : expected)
    if (*at++ != size) return false;
  return true;
}

bool Tensor::mixes(const Tensor& x) const {
  const auto f32 = [](const Tensor& t) { return t.kind == kFloat && t.bits == 32; };
  const auto half = [](const Tensor& t) { return t.floats() && t.bits == 16; };
  if (!same_device(x)) return false;
  return (kind == x.kind && bits == x.bits) || (f32(*this) && half(x)) || (half(*this) && f32(x));
}

bool plain(py::handle tensors) {
  if (!PyTuple_Check(tensors.ptr())) throw py::type_error("a tuple is taken");
  const Torch& t = torch();
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(tensors.ptr()); ++i) {
    const py::handle each = PyTuple_GET_ITEM(tensors.ptr(), i);
    if (each.is_none()) continue;
    const PyTypeObject* const type = Py_TYPE(each.ptr());
    if ((type != t.tensor && type != t.parameter) || says(each, t.is_neg) || says(each, t.is_zero)) return false;
  }
  return true;
}

bool ordinary_call(py::handle tensors) {
  if (!ordinary() || !plain(tensors) || PyTuple_GET_SIZE(tensors.ptr()) == 0) return false;
  const py::handle x = PyTuple_GET_ITEM(tensors.ptr(), 0);
  // torch takes a millisecond to refuse to read a tensor without memory
  return !x.is_none() && (has(x, torch().is_cpu) || has(x, torch().is_cuda));
}

Tensor tensor_of(py::handle object) {
  if (!PyObject_TypeCheck(object.ptr(), torch().tensor))
    throw py::type_error(std::string("a ") + Py_TYPE(object.ptr())->tp_name + " was given; it must be a tensor");
  DLTensor found;
  if (torch().read(object.ptr(), &found) != 0) throw py::error_already_set();
  return {static_cast<char*>(found.data) + found.byte_offset,
          found.ndim,
          found.shape,
          found.strides,
          found.code,
          found.bits,
          found.device_type,
          found.device_id};
}

Tensor tensor_of(py::handle object, int64_t ndim) {
  const Tensor tensor = tensor_of(object);
  if (tensor.ndim != ndim) wrong_ndim(tensor.ndim, ndim);
  return tensor;
}

bool may_be_parameter(py::handle object, const Tensor& x, std::initializer_list<int64_t> sizes) {
  if (object.is_none()) return true;
  const Tensor t = tensor_of(object);
  return t.mixes(x) && t.has_sizes(sizes);
}

bool may_be_longs(py::handle object, const Tensor& x, int64_t size) {
  const Tensor t = tensor_of(object);
  return t.longs() && t.same_device(x) && t.has_sizes({size});
}

bool may_be_rows(const Tensor& x, int64_t table, py::handle index, py::handle bounds) {
  if (x.ndim != (bounds.is_none() ? 3 : 2)) return false;
  int64_t sequences = x.sizes[0];
  if (!bounds.is_none()) {
    const Tensor t = tensor_of(bounds);
    if (t.kind != kInt || t.bits != 32 || t.ndim != 1 || t.sizes[0] == 0 || !t.same_device(x)) return false;
    sequences = t.sizes[0] - 1;
  }
  return index.is_none() ? table == sequences : may_be_longs(index, x, sequences);
}

bool may_be_contexts(const Tensor& x, const Tensor& context, py::handle index, py::handle bounds) {
  if (context.ndim == 2) return may_be_rows(x, context.sizes[0], index, bounds);
  return context.ndim == 3 && x.ndim == 3 && index.is_none() && bounds.is_none() && context.sizes[0] == x.sizes[0] &&
         context.sizes[1] == x.sizes[1];
}

Operand operand_of(const Tensor& tensor) {
  Operand operand{tensor.data, Dtype::f32, {0, 0, 0}};
  if (tensor.kind == kBfloat && tensor.bits == 16)
    operand.dtype = Dtype::bf16;
  else if (tensor.kind == kFloat && tensor.bits == 16)
    operand.dtype = Dtype::f16;
  else if (tensor.kind != kFloat || tensor.bits != 32)
    throw std::invalid_argument("a tensor has another dtype than float32, bfloat16 and float16");
  if (tensor.ndim > 3) wrong_ndim(tensor.ndim, 3);
  for (int64_t i = 0; i < tensor.ndim; ++i) operand.strides[i] = tensor.strides[i];
  return operand;
}

Operand operand_of(py::handle object, int64_t ndim) {
  return object.is_none() ? Operand{nullptr, Dtype::f32, {0, 0, 0}} : operand_of(tensor_of(object, ndim));
}

char* address_of(py::handle object) { return object.is_none() ? nullptr : tensor_of(object).data; }

const int64_t* longs_of(py::handle object) {
  if (object.is_none()) return nullptr;
  const Tensor tensor = tensor_of(object);
  if (!tensor.longs()) throw std::invalid_argument("a tensor has another dtype than int64");
  return reinterpret_cast<const int64_t*>(tensor.data);
}

Batch batch_of(const Tensor& x, int64_t table, py::handle index, py::handle bounds) {
  Batch batch{nullptr, longs_of(index), 0, 0, 0, table};
  if (bounds.is_none()) {
    if (x.ndim != 3) wrong_ndim(x.ndim, 3);
    batch.sequences = x.sizes[0];
    batch.length = x.sizes[1];
    batch.tokens = x.sizes[0] * x.sizes[1];
    return batch;
  }
  const Tensor given = tensor_of(bounds, 1);
  if (given.kind != kInt || given.bits != 32) throw std::invalid_argument("bounds have another dtype than int32");
  batch.tokens = x.sizes[0];
  batch.sequences = given.sizes[0] - 1;
  batch.bounds = reinterpret_cast<const int32_t*>(given.data);
  return batch;
}

py::object empty_like(py::handle tensor) { return made(PyObject_CallOneArg(torch().like, tensor.ptr())); }

py::object new_rows(py::handle x, const Tensor& as, int64_t columns) {
  py::tuple sizes(as.ndim);
  for (int64_t i = 0; i < as.ndim; ++i) sizes[i] = py::int_(i + 1 < as.ndim ? as.sizes[i] : columns);
  return made(PyObject_CallMethodOneArg(x.ptr(), torch().new_empty, sizes.ptr()));
}

py::object new_turned(py::handle as, const Tensor& given) {
  const py::tuple sizes = py::make_tuple(given.sizes[0], given.sizes[2], given.sizes[1]);
  const py::object memory = made(PyObject_CallMethodOneArg(as.ptr(), torch().new_empty, sizes.ptr()));
  return made(PyObject_GetAttr(memory.ptr(), torch().mT));
}

py::object sum_of_rows(py::handle rows, int64_t ndim, py::handle like) {
  py::tuple over(ndim - 1);
  for (int64_t i = 0; i + 1 < ndim; ++i) over[i] = py::int_(i);
  const py::object sum = made(PyObject_CallMethodOneArg(rows.ptr(), torch().sum, over.ptr()));
  const py::object dtype = made(PyObject_GetAttr(like.ptr(), torch().dtype));
  return made(PyObject_CallMethodOneArg(sum.ptr(), torch().to, dtype.ptr()));
}

py::object linear(py::handle x, py::handle weight, py::handle bias) {
  PyObject* const given[] = {x.ptr(), weight.ptr(), bias.ptr()};
  const py::object y = made(PyObject_Vectorcall(torch().linear, given, 3, nullptr));
  return made(PyObject_CallMethodNoArgs(y.ptr(), torch().contiguous));
}

py::object matmul(py::handle rows, py::handle weight) {
  PyObject* const given[] = {rows.ptr(), weight.ptr()};
  const py::object product = made(PyObject_Vectorcall(torch().matmul, given, 2, nullptr));
  return made(PyObject_CallMethodNoArgs(product.ptr(), torch().contiguous));
}

bool all_dense(py::handle tensors) {
  const auto count = static_cast<int64_t>(PySequence_Size(tensors.ptr()));
  for (int64_t i = 0; i < count; ++i) {
    const py::handle each = entry(tensors, i, count);
    if (!each.is_none() && !tensor_of(each).dense()) return false;
  }
  return true;
}

py::handle entry(py::handle sequence, int64_t i, int64_t size) {
  if (PyTuple_Check(sequence.ptr()) && PyTuple_GET_SIZE(sequence.ptr()) == size)
    return PyTuple_GET_ITEM(sequence.ptr(), i);
  if (PyList_Check(sequence.ptr()) && PyList_GET_SIZE(sequence.ptr()) == size)
    return PyList_GET_ITEM(sequence.ptr(), i);
  throw std::invalid_argument("a list or tuple of " + std::to_string(size) + " was expected");
}

}  // namespace ctxkern
