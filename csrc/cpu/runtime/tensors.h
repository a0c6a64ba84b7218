// Tensors as Python gives them, read by the C functions that torch offers for DLPack, which call nothing of Python.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <initializer_list>

#include "../../problem.h"

namespace ctxkern {

// Imports torch, whose tensors the functions below read; before them. Throws where torch is too old for that.
void find_torch();

// A view of a tensor that outlives it.
struct Tensor {
  char* data;  // null where there are no elements
  int64_t ndim;
  const int64_t *sizes, *strides;
  uint8_t kind, bits;  // of the dtype, as DLPack has them
  int32_t device_type, device;

  int64_t bytes() const;
  bool dense() const;  // rows after one another without gaps
  bool floats() const;
  bool longs() const;
  bool same_device(const Tensor& other) const;
  bool has_sizes(std::initializer_list<int64_t> expected) const;
  // Whether it may be a parameter of activations x, as ctxkern/dtypes.py has it.
  bool mixes(const Tensor& x) const;
};

// Whether each of a tuple is None, or a tensor whose memory may be read as it lies (is_plain of ctxkern/ops.py). Throws
// TypeError for what is no tuple.
bool plain(pybind11::handle tensors);

// The same of a tuple that begins with x, on a CPU or GPU, in a call that nothing sees or changes (modes.h).
bool ordinary_call(pybind11::handle tensors);

// Throws what torch raises, TypeError for what is no tensor, ValueError where it does not have `ndim` dimensions.
Tensor tensor_of(pybind11::handle object);
Tensor tensor_of(pybind11::handle object, int64_t ndim);

// Whether an argument is None or a parameter of activations x; whether it is `size` values of int64 next to x.
bool may_be_parameter(pybind11::handle object, const Tensor& x, std::initializer_list<int64_t> sizes);
bool may_be_longs(pybind11::handle object, const Tensor& x, int64_t size);

// Whether index and bounds, or None, may say which of `table` rows each sequence of x [B, S, D], or of a packed x [N, D],
// uses; index None: each its own, in order. The same of a context table [F, K]; true too of a context per token, [B, S, K].
bool may_be_rows(const Tensor& x, int64_t table, pybind11::handle index, pybind11::handle bounds);
bool may_be_contexts(const Tensor& x, const Tensor& context, pybind11::handle index, pybind11::handle bounds);

// A tensor of floats with up to three dimensions; absent for None.
Operand operand_of(const Tensor& tensor);
Operand operand_of(pybind11::handle object, int64_t ndim);

// The elements of a tensor without gaps; null for None.
char* address_of(pybind11::handle object);
const int64_t* longs_of(pybind11::handle object);

// Which row of a table each row of x [B, S, D], or of a packed x [N, D] with bounds, uses.
Batch batch_of(const Tensor& x, int64_t table, pybind11::handle index, pybind11::handle bounds);

// New tensors of torch: like another, as x with other sizes but the last, of the sizes of another that has three dimensions
// with the last two the other way round in memory, and the sums over all rows of rows of x or dy in the dtype of another.
pybind11::object empty_like(pybind11::handle tensor);
pybind11::object new_rows(pybind11::handle x, const Tensor& as, int64_t columns);
pybind11::object new_turned(pybind11::handle as, const Tensor& given);
pybind11::object sum_of_rows(pybind11::handle rows, int64_t ndim, pybind11::handle like);

// torch's products: x weight^T + bias without gaps, or bias None, and rows weight.
pybind11::object linear(pybind11::handle x, pybind11::handle weight, pybind11::handle bias);
pybind11::object matmul(pybind11::handle rows, pybind11::handle weight);

// Whether each of a list or tuple is None or dense.
bool all_dense(pybind11::handle tensors);

// Entry i of a list or tuple of `size`.
pybind11::handle entry(pybind11::handle sequence, int64_t i, int64_t size);

}  // namespace ctxkern
