// PyTorch's tensors, read through the table of C functions that DLPack defines for it (DLPack 1.1 and later, in PyTorch
// from 2.10): pointer, dtype and sizes of a tensor in some 40 ns, where its Python attributes take ten times that.
// Nothing of PyTorch is included or linked.
//
// Tensors of other classes, layouts, devices or dtypes are refused without an exception; the caller leaves them to Python.
#pragma once

#include <pybind11/pybind11.h>

#include "checks.h"

namespace fastdiff {
namespace tensors {

// The DType of a tensor, or kIndex for int64.
constexpr int kIndex = kInt64;

// The bytes of a number of a DType, or kIndex.
inline size_t size_of(int dtype) {
  return dtype == int(DType::f64) || dtype == kIndex ? 8 : dtype == int(DType::f32) ? 4 : dtype == int(DType::u8) ? 1 : 2;
}

struct View {
  void* data;
  int dtype;
  int dims;
  const int64_t* sizes;  // the tensor's own
  int64_t elements;      // at least 1

  bool floating() const { return dtype <= int(DType::f16); }
  size_t item_size() const { return size_of(dtype); }
  Input input() const { return {data, DType(dtype)}; }
  Output output() const { return {data, DType(dtype), false}; }
};

// Makes the functions below work. `table`: the capsule of DLPack's functions; `kinds`: the classes, all others are
// refused; `dtypes`: PyTorch's, by DType; `large`: what takes the place of `empty_like` for results of at least so many
// bytes, and how many; the rest are functions of PyTorch. Raises ValueError for a table of another version.
void enable(py::capsule table, py::tuple kinds, py::tuple dtypes, py::function empty_like, py::tuple large,
            py::function grad_enabled, py::function transform);
bool enabled();

// Whether a torch.func transform is at work, whose tensors have no memory of their own.
bool transformed();

// Where a tensor lies, in DLPack's numbers.
struct Device {
  int32_t type, id;

  bool operator==(const Device& other) const { return type == other.type && id == other.id; }
};

// A contiguous CPU tensor of a dtype that we know, of one of the classes, with elements. `bools`: one of bool too, as uint8.
bool view(PyObject* tensor, View& view, bool bools = false);

// The same on any device, of the first of the classes alone.
bool is_tensor(PyObject* object);
bool view_anywhere(PyObject* tensor, View& view, Device& device);

// PyTorch's current stream on a device; false where it cannot be had.
bool current_stream(Device device, void*& stream);

// Whether an operation on a tensor must be recorded for its gradient.
bool differentiable(PyObject* tensor);
bool requires_gradient(PyObject* tensor);
bool gradients_are_recorded();

bool same_shape(const View& a, const View& b);

struct NotPlain {};

// A new tensor of a dtype like a contiguous one, which has another or the same, and so many elements. Throws NotPlain
// where a mode of PyTorch makes another kind.
py::object make_like(PyObject* tensor, DType has, DType dtype, int64_t elements, Output& to);

// A fast call: None where tensors cannot be read, or made.
template <py::object (*function)(PyObject* const*)>
py::object fast_call(PyObject* const* arguments) {
  try {
    return enabled() ? function(arguments) : py::none();
  } catch (const NotPlain&) {
    return py::none();
  }
}

// Reads contiguous tensors of one shape, floating-point or where it says so images, through which no gradient is to flow. What is unfit raises
// nothing: `fits` becomes false, and Python does the call, or refuses it.
class Reader : public fastdiff::Reader {
 public:
  bool fits;

  // `first`: the operand that is read first. Its dimension 0 is the batch, one row a sample. `recorded`: its gradient is
  // the caller's. `table`: of a step table, which is for data that is not float64, and takes no seeds. `image`: the first
  // operand may be one. `starts`: of packed sequences, int64; null or None: there are none.
  explicit Reader(PyObject* first, bool recorded = false, bool table = false, bool image = false, PyObject* starts = nullptr);
  void input(const char* name, py::handle value, Input& to, bool image = false);
  void image(const char* name, py::handle value, Input& to) { input(name, value, to, true); }
  void noise(const char* name, py::handle value, Noise& to);
  // Contiguous, bool or of a dtype of data, not 0 everywhere. Its dimensions are the first of the operands', or all.
  void mask(py::handle value, Mask& to);
  void rows(const char* name, py::handle value, Rows& to, int columns = 1);  // one row in the compute dtype
  double number(const char* name, py::handle value);
  void refuse(const char* name, const char* why);

 protected:
  View first_;

 private:
  PyObject* unread_;  // the first operand, until it is
  bool table_;
};

}  // namespace tensors
}  // namespace fastdiff
