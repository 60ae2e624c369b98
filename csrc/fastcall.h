// Functions of the module that take their arguments as an array: pybind11's own calling takes longer than what they do.
#pragma once

#include <pybind11/pybind11.h>

#include <exception>
#include <string>

namespace fastdiff {

inline pybind11::object owned(PyObject* made) {
  if (!made) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(made);
}

// What a function returns, or null with an exception set.
template <class Function>
PyObject* guarded(Function function) {
  try {
    return function().release().ptr();
  } catch (pybind11::error_already_set& error) {
    error.restore();
  } catch (const pybind11::builtin_exception& error) {
    error.set_error();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <pybind11::object (*function)(PyObject* const*), int count>
PyObject* fastcall(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
  return guarded([&] {
    if (given != count) throw pybind11::type_error("expected " + std::to_string(count) + " arguments");
    return function(arguments);
  });
}

template <pybind11::object (*function)(PyObject* const*), int count>
constexpr PyMethodDef fast_method(const char* name) {
  return {name, (PyCFunction)(void (*)())fastcall<function, count>, METH_FASTCALL, nullptr};
}

}  // namespace fastdiff
