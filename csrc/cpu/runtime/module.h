// The Python module: each family binds its functions to it.
#pragma once

#include <pybind11/pybind11.h>

#include <new>
#include <stdexcept>

namespace ctxkern {

// f(arguments) of exactly N as a function of Python without what pybind11 does for each call: 2 µs of the bench's smallest.
template <int N, PyObject* (*f)(PyObject* const*)>
PyObject* called(PyObject*, PyObject* const* given, Py_ssize_t count) {
  try {
    if (count != N) throw pybind11::type_error("another number of arguments is taken");
    return f(given);
  } catch (pybind11::error_already_set& error) {
    error.restore();
  } catch (const pybind11::builtin_exception& error) {
    error.set_error();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

template <int N, PyObject* (*f)(PyObject* const*)>
PyMethodDef method(const char* name, const char* doc) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(&called<N, f>)), METH_FASTCALL, doc};
}

void bind_modulated(pybind11::module_& m);
void bind_lora(pybind11::module_& m);
void bind_gates(pybind11::module_& m);

}  // namespace ctxkern
