// PyTorch's tensors, read through the table of C functions that DLPack defines for it (DLPack 1.1 and later, in PyTorch
// from 2.10): pointer, dtype and sizes of a tensor in some 40 ns, where its Python attributes take ten times that.
// Nothing of PyTorch is included or linked.
//
// Tensors of other classes, layouts, devices or dtypes are refused without an exception; the caller leaves them to Python.
#pragma once

#include <pybind11/pybind11.h>

#include "cpu/arguments.h"

namespace fastdiff {
namespace tensors {

namespace py = pybind11;

// The DType of a tensor, or kIndex for int64.
constexpr int kIndex = kInt64;

struct View {
  void* data;
  int dtype;
  int dims;
  const int64_t* sizes;  // the tensor's own
  int64_t elements;      // at least 1

  bool floating() const { return dtype <= int(DType::f16); }
  size_t item_size() const {
    return dtype == int(DType::f64) || dtype == kIndex ? 8 : dtype == int(DType::f32) ? 4 : 2;
  }
  Input input() const { return {data, DType(dtype)}; }
  Output output() const { return {data, DType(dtype), false}; }
};

// Makes the functions below work. `table`: the capsule of DLPack's functions; `kinds`: the classes, all others are
// refused; the rest are functions of PyTorch. Raises ValueError for a table of another version.
void enable(py::capsule table, py::tuple kinds, py::function empty_like, py::function grad_enabled,
            py::function transform);
bool enabled();

// Whether a torch.func transform is at work, whose tensors have no memory of their own.
bool transformed();

// A contiguous CPU tensor of a dtype that we know, of one of the classes, with elements.
bool view(PyObject* tensor, View& view);

// Whether an operation on a tensor must be recorded for its gradient.
bool differentiable(PyObject* tensor);

bool same_shape(const View& a, const View& b);

// A new tensor like a contiguous one; null with an exception set if there is no memory.
PyObject* empty_like(PyObject* tensor);

}  // namespace tensors
}  // namespace fastdiff
