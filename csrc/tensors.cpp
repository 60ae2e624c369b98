#include "tensors.h"

#include <cstring>

#include "fastcall.h"

namespace fastdiff {
namespace tensors {

namespace {

// DLPack's structures, as its specification lays them out in memory.
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
  int (*stream)(int32_t type, int32_t id, void** stream);
};
constexpr int32_t kCpu = 1;
enum TypeCode { kInt = 0, kUnsigned = 1, kFloat = 2, kBrainFloat = 4, kBool = 6 };

constexpr int kMostKinds = 4;

const Functions* functions = nullptr;
PyObject* kinds[kMostKinds];
PyObject* dtypes[4];
PyObject *dtype_names, *empty_like_function, *large_empty_like_function, *grad_enabled_function, *transform_function,
    *requires_grad, *is_negative_name;
int64_t large_bytes;

int dtype_of(DataType type) {
  if (type.lanes != 1) return -1;
  if (type.code == kFloat && type.bits == 32) return int(DType::f32);
  if (type.code == kFloat && type.bits == 64) return int(DType::f64);
  if (type.code == kBrainFloat && type.bits == 16) return int(DType::bf16);
  if (type.code == kFloat && type.bits == 16) return int(DType::f16);
  if (type.code == kUnsigned && type.bits == 8) return int(DType::u8);
  return type.code == kInt && type.bits == 64 ? kIndex : -1;
}

bool is_true(PyObject* value) {
  const bool yes = value == Py_True;
  Py_XDECREF(value);
  if (!value) PyErr_Clear();
  return yes;
}

}  // namespace

void enable(py::capsule table, py::tuple classes, py::tuple kinds_of_number, py::function empty_like,
            py::tuple large, py::function grad_enabled, py::function transform) {
  const auto* found = (const Functions*)PyCapsule_GetPointer(table.ptr(), "dlpack_exchange_api");
  if (!found) throw py::error_already_set();
  if (found->major != 1 || !found->view) throw py::value_error("table: expected one of DLPack 1, with views");
  if (py::len(kinds_of_number) != 4) throw py::value_error("dtypes: expected four");
  if (py::len(classes) > kMostKinds) throw py::value_error("kinds: too many");
  std::memset(kinds, 0, sizeof(kinds));
  for (size_t k = 0; k < py::len(classes); ++k) kinds[k] = py::object(classes[k]).release().ptr();
  // Held as long as the process lives, as the module is.
  for (size_t k = 0; k < 4; ++k) dtypes[k] = py::object(kinds_of_number[k]).release().ptr();
  dtype_names = py::make_tuple("dtype").release().ptr();
  empty_like_function = empty_like.release().ptr();
  large_empty_like_function = py::function(large[0]).release().ptr();
  large_bytes = large[1].cast<int64_t>();
  grad_enabled_function = grad_enabled.release().ptr();
  transform_function = transform.release().ptr();
  is_negative_name = py::str("is_neg").release().ptr();
  requires_grad = py::object(classes[0].attr("requires_grad")).release().ptr();
  if (!Py_TYPE(requires_grad)->tp_descr_get) throw py::value_error("kinds: the first has no requires_grad");
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

namespace {

// A contiguous tensor, whatever its class.
bool read(PyObject* tensor, View& out, Device& device, bool bools) {
  DLTensor found;
  if (functions->view(tensor, &found) != 0) {
    PyErr_Clear();
    return false;
  }
  if (bools && found.dtype.code == kBool) found.dtype.code = kUnsigned;
  out.dtype = dtype_of(found.dtype);
  device = found.device;
  if (out.dtype < 0) return false;
  out.dims = found.dims;
  out.sizes = found.sizes;
  out.elements = 1;
  for (int d = found.dims - 1; d >= 0; --d) {
    if (found.sizes[d] != 1 && found.strides && found.strides[d] != out.elements) return false;
    out.elements *= found.sizes[d];
  }
  out.data = (char*)found.data + found.byte_offset;
  // PyTorch negates some tensors as they are read (the imaginary part of a conjugate). Those of several numbers have gaps.
  if (out.elements == 1 && is_true(PyObject_CallMethodNoArgs(tensor, is_negative_name))) return false;
  return out.elements > 0 && found.data;
}

}  // namespace

bool view(PyObject* tensor, View& out, bool bools) {
  PyObject* kind = (PyObject*)Py_TYPE(tensor);
  int k = 0;
  while (k < kMostKinds && kinds[k] != kind) ++k;
  Device device;
  return k < kMostKinds && read(tensor, out, device, bools) && device.type == kCpu;
}

bool is_tensor(PyObject* object) { return (PyObject*)Py_TYPE(object) == kinds[0]; }

bool view_anywhere(PyObject* tensor, View& out, Device& device) { return is_tensor(tensor) && read(tensor, out, device, false); }

bool current_stream(Device device, void*& stream) {
  if (functions->stream && functions->stream(device.type, device.id, &stream) == 0) return true;
  PyErr_Clear();
  return false;
}

bool requires_gradient(PyObject* tensor) {
  // All kinds have the descriptor of the first: asking it saves the search for it.
  PyObject* const kind = (PyObject*)Py_TYPE(tensor);
  return is_true(Py_TYPE(requires_grad)->tp_descr_get(requires_grad, tensor, kind));
}

bool gradients_are_recorded() { return is_true(PyObject_CallNoArgs(grad_enabled_function)); }

bool differentiable(PyObject* tensor) { return requires_gradient(tensor) && gradients_are_recorded(); }

bool same_shape(const View& a, const View& b) {
  return a.dims == b.dims && std::memcmp(a.sizes, b.sizes, sizeof(int64_t) * size_t(a.dims)) == 0;
}

py::object make_like(PyObject* tensor, DType has, DType dtype, int64_t elements, Output& to) {
  PyObject* const arguments[] = {tensor, dtypes[int(dtype)]};
  const bool large = int64_t(size_of(int(dtype))) * elements >= large_bytes;
  PyObject* const make = large ? large_empty_like_function : empty_like_function;
  py::object made = owned(has == dtype ? PyObject_CallOneArg(make, tensor)
                                       : PyObject_Vectorcall(make, arguments, 1, dtype_names));
  View found;
  if (!view(made.ptr(), found) || found.dtype != int(dtype) || found.elements != elements) throw NotPlain();
  to = found.output();
  return made;
}

namespace {

// Whether a number is not 0.
template <class Bits>
bool any(const View& numbers) {
  const Bits all = Bits(~Bits(0)), but_signs = all >> 1, counts = numbers.floating() ? but_signs : all;
  for (int64_t k = 0; k < numbers.elements; ++k)
    if (((const Bits*)numbers.data)[k] & counts) return true;
  return false;
}

bool any(const View& numbers) {
  const size_t size = numbers.item_size();
  return size == 1   ? any<uint8_t>(numbers)
         : size == 2 ? any<uint16_t>(numbers)
         : size == 4 ? any<uint32_t>(numbers)
                     : any<uint64_t>(numbers);
}

bool is_data(const View& tensor, bool image) { return tensor.floating() || (image && tensor.dtype == int(DType::u8)); }

}  // namespace

Reader::Reader(PyObject* first, bool recorded, bool table, bool image, PyObject* starts)
    : fastdiff::Reader(Layout{}), unread_(first), table_(table) {
  fits = view(first, first_) && is_data(first_, image) && first_.dims >= 1 && (recorded || !differentiable(first));
  if (!fits) return;
  const int64_t batch = first_.sizes[0], elements = first_.elements;
  layout = {batch, 1, 1, elements / batch, batch, first_.dims > 1 ? first_.sizes[1] : 1, batch, elements, nullptr};
  if (!given(starts)) return;
  View of;
  fits = view(starts, of) && of.dtype == kIndex;
  if (fits) layout = layout_of_sequences({of.data, of.dtype, of.elements});
  fits = fits && layout.elements == elements;
}

void Reader::input(const char*, py::handle value, Input& to, bool image) {
  if (!value || !fits) return;
  View found;
  if (value.ptr() == unread_)
    to = first_.input();
  else if ((fits = view(value.ptr(), found) && is_data(found, image) && same_shape(found, first_) &&
                   !differentiable(value.ptr())))
    to = found.input();
  unread_ = nullptr;
  if (to.dtype != DType::f64) return;
  fits = fits && !table_;
  if (!known) wide = true;
}

void Reader::noise(const char* name, py::handle value, Noise& to) {
  if (!fits) return;
  if (value && PyTuple_Check(value.ptr()) && !table_) {
    to = parse_noise(name, value, layout);
    fits = fits && to.kind == Noise::made;
  } else if (value) {
    to.kind = Noise::given;
    input(name, value, to.tensor);
  }
}

void Reader::mask(py::handle value, Mask& to) {
  View found;
  fits = fits && view(value.ptr(), found, true) && is_data(found, true) && found.dims <= first_.dims &&
         first_.dims <= kMostDims && !differentiable(value.ptr());
  // One of two dimensions could be meant for frames or for channels.
  if (!fits || !(fits = found.dims != 2 || first_.dims < 5)) return;
  int64_t strides[kMostDims] = {}, step = 1;
  for (int d = found.dims - 1; d >= 0; --d) {
    if (found.sizes[d] != 1) strides[d] = step;
    if (found.sizes[d] != 1 && found.sizes[d] != first_.sizes[d]) fits = false;
    step *= found.sizes[d];
  }
  fits = fits && !find_strides(first_.sizes, strides, first_.dims, layout.elements, found.elements, to.at) && any(found);
  to.tensor = found.input();
}

void Reader::rows(const char*, py::handle value, Rows& to, int columns) {
  if (!value || !fits) return;
  View row;
  known = true;
  fits = view(value.ptr(), row) && row.dims == 1 && row.elements == columns && row.dtype == int(compute()) &&
         !differentiable(value.ptr());
  if (fits) to = {row.data, 0};
}

double Reader::number(const char* name, py::handle value) {
  if (PyFloat_Check(value.ptr()) || PyLong_Check(value.ptr())) return parse_number(name, value);
  fits = false;
  return 0;
}

void Reader::refuse(const char*, const char*) { fits = false; }

}  // namespace tensors
}  // namespace fastdiff
