#include "tensors.h"

#include <cstring>

namespace fastdiff {
namespace tensors {

namespace {

// DLPack's structures, as its specification lays them out in memory.
struct Device {
  int32_t type, id;
};
struct DataType {
  uint8_t code, bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  Device device;
  int32_t dims;
  DataType dtype;
  int64_t *sizes, *strides;
  uint64_t byte_offset;
};
struct Functions {
  uint32_t major, minor;
  Functions* older;
  void *allocate, *own, *give;
  int (*view)(void* tensor, DLTensor* out);
  void* stream;
};
constexpr int32_t kCpu = 1;
enum TypeCode { kInt = 0, kFloat = 2, kBrainFloat = 4 };

constexpr int kMostKinds = 4;

const Functions* functions = nullptr;
PyObject* kinds[kMostKinds];
PyObject *empty_like_function, *grad_enabled_function, *transform_function, *requires_grad_name;

int dtype_of(DataType type) {
  if (type.lanes != 1) return -1;
  if (type.code == kFloat && type.bits == 32) return int(DType::f32);
  if (type.code == kFloat && type.bits == 64) return int(DType::f64);
  if (type.code == kBrainFloat && type.bits == 16) return int(DType::bf16);
  if (type.code == kFloat && type.bits == 16) return int(DType::f16);
  return type.code == kInt && type.bits == 64 ? kIndex : -1;
}

bool is_true(PyObject* value) {
  const bool yes = value == Py_True;
  Py_XDECREF(value);
  if (!value) PyErr_Clear();
  return yes;
}

}  // namespace

void enable(py::capsule table, py::tuple classes, py::function empty_like, py::function grad_enabled,
            py::function transform) {
  const auto* found = (const Functions*)PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api");
  if (!found) throw py::error_already_set();
  if (found->major != 1 || !found->view) throw py::value_error("table: expected one of DLPack 1, with views");
  if (py::len(classes) > kMostKinds) throw py::value_error("kinds: too many");
  std::memset(kinds, 0, sizeof(kinds));
  for (size_t k = 0; k < py::len(classes); ++k) kinds[k] = py::object(classes[k]).release().ptr();
  // Held as long as the process lives, as the module is.
  empty_like_function = empty_like.release().ptr();
  grad_enabled_function = grad_enabled.release().ptr();
  transform_function = transform.release().ptr();
  requires_grad_name = PyUnicode_InternFromString("requires_grad");
  functions = found;
}

bool enabled() { return functions; }

bool transformed() {
  PyObject* top = PyObject_CallNoArgs(transform_function);
  const bool none = top == Py_None;
  Py_XDECREF(top);
  if (!top) PyErr_Clear();
  return !none;
}

bool view(PyObject* tensor, View& out) {
  PyObject* kind = (PyObject*)Py_TYPE(tensor);
  int k = 0;
  while (k < kMostKinds && kinds[k] != kind) ++k;
  if (k == kMostKinds) return false;
  DLTensor found;
  if (functions->view(tensor, &found) != 0) {
    PyErr_Clear();
    return false;
  }
  out.dtype = dtype_of(found.dtype);
  if (out.dtype < 0 || found.device.type != kCpu) return false;
  out.dims = found.dims;
  out.sizes = found.sizes;
  out.elements = 1;
  for (int d = found.dims - 1; d >= 0; --d) {
    if (found.sizes[d] != 1 && found.strides && found.strides[d] != out.elements) return false;
    out.elements *= found.sizes[d];
  }
  out.data = (char*)found.data + found.byte_offset;
  return out.elements > 0 && found.data;
}

bool differentiable(PyObject* tensor) {
  return is_true(PyObject_GetAttr(tensor, requires_grad_name)) && is_true(PyObject_CallNoArgs(grad_enabled_function));
}

bool same_shape(const View& a, const View& b) {
  return a.dims == b.dims && std::memcmp(a.sizes, b.sizes, sizeof(int64_t) * size_t(a.dims)) == 0;
}

PyObject* empty_like(PyObject* tensor) { return PyObject_CallOneArg(empty_like_function, tensor); }

}  // namespace tensors
}  // namespace fastdiff
