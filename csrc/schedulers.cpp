#include "schedulers.h"

#include <cstring>

#include "fastcall.h"
#include "tensors.h"

namespace fastdiff {

namespace {

namespace py = pybind11;

PyObject *version_name, *dict_name, *config_name;

PyObject* tuple_item(PyObject* tuple, Py_ssize_t k, Py_ssize_t size) {
  if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != size) throw py::type_error("expected a tuple");
  return PyTuple_GET_ITEM(tuple, k);
}

Py_ssize_t length(PyObject* tuple) {
  if (!PyTuple_Check(tuple)) throw py::type_error("expected a tuple");
  return PyTuple_GET_SIZE(tuple);
}

bool equal(PyObject* a, PyObject* b) {
  const int same = PyObject_RichCompareBool(a, b, Py_EQ);
  if (same < 0) throw py::error_already_set();
  return same;
}

// What a dictionary has under a name, borrowed; None where it has nothing.
PyObject* find(PyObject* dict, PyObject* name) {
  PyObject* found = PyDict_GetItemWithError(dict, name);
  if (!found && PyErr_Occurred()) throw py::error_already_set();
  return found ? found : Py_None;
}

// Whether both are plain CPU tensors of one dtype and shape with the same bits.
bool same_bits(PyObject* a, PyObject* b) {
  tensors::View one, other;
  if (!tensors::view(a, one) || !tensors::view(b, other)) return false;
  if (one.dtype != other.dtype || !tensors::same_shape(one, other)) return false;
  return std::memcmp(one.data, other.data, size_t(one.elements) * one.item_size()) == 0;
}

// is_current((tensors, versions, others, config, settings), held) -> bool; see Coefficients of
// fastdiff/integrations/diffusers/coefficient_cache.py, which says what these are.
py::object is_current(PyObject* const* a) {
  PyObject *tensors = tuple_item(a[0], 0, 5), *versions = tuple_item(a[0], 1, 5), *others = tuple_item(a[0], 2, 5),
           *config = tuple_item(a[0], 3, 5), *settings = tuple_item(a[0], 4, 5), *held = a[1];
  if (!PyDict_Check(held)) throw py::type_error("held: expected a dict");
  for (Py_ssize_t k = 0; k < length(tensors); ++k) {
    PyObject* pair = PyTuple_GET_ITEM(tensors, k);
    PyObject *tensor = tuple_item(pair, 1, 3), *copy = PyTuple_GET_ITEM(pair, 2);
    if (find(held, PyTuple_GET_ITEM(pair, 0)) != tensor) return py::bool_(false);
    if (copy != Py_None && !same_bits(tensor, copy)) return py::bool_(false);
  }
  for (Py_ssize_t k = 0; k < length(versions); ++k) {
    PyObject* pair = PyTuple_GET_ITEM(versions, k);
    const py::object version = owned(PyObject_GetAttr(tuple_item(pair, 0, 2), version_name));
    if (!equal(version.ptr(), tuple_item(pair, 1, 2))) return py::bool_(false);
  }
  for (Py_ssize_t k = 0; k < length(others); ++k) {
    PyObject* pair = PyTuple_GET_ITEM(others, k);
    if (!equal(find(held, tuple_item(pair, 0, 2)), tuple_item(pair, 1, 2))) return py::bool_(false);
  }
  if (find(held, config_name) != config) return py::bool_(false);
  return py::bool_(equal(owned(PyObject_GetAttr(config, dict_name)).ptr(), settings));
}

// make_output(class, first name, value, second name or None, value) -> an OrderedDict of that class with the values as
// attributes and as items, without its constructor.
py::object make_output(PyObject* const* a) {
  if (!PyType_Check(a[0]) || !PyType_IsSubtype((PyTypeObject*)a[0], &PyODict_Type))
    throw py::type_error("class: expected one of an OrderedDict");
  auto* type = (PyTypeObject*)a[0];
  const py::object made = owned(type->tp_new(type, py::tuple().ptr(), nullptr));
  const py::object attributes = owned(PyObject_GetAttr(made.ptr(), dict_name));
  for (int k = 1; k < 5 && a[k] != Py_None; k += 2)
    if (PyDict_SetItem(attributes.ptr(), a[k], a[k + 1]) || PyODict_SetItem(made.ptr(), a[k], a[k + 1]))
      throw py::error_already_set();
  return made;
}

PyMethodDef methods[] = {fast_method<is_current, 2>("is_current"), fast_method<make_output, 5>("make_output"),
                         {nullptr, nullptr, 0, nullptr}};

}  // namespace

void bind_schedulers(py::module_& module) {
  version_name = PyUnicode_InternFromString("_version");
  dict_name = PyUnicode_InternFromString("__dict__");
  config_name = PyUnicode_InternFromString("_internal_dict");
  if (PyModule_AddFunctions(module.ptr(), methods) != 0) throw py::error_already_set();
}

}  // namespace fastdiff
