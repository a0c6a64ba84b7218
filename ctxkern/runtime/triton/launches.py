"""Launches of a call, laid out once for its sizes and kept: Python then pays for allocations and the driver alone.

A form lays them out on `Operand`s that stand for tensors (ctxkern/modulated/triton, grouping.py). Triton looks a kernel
up at every launch, 13 to 18 µs; what it found the first time is called from then on, which is right because all that
Triton looks at, layouts, dtypes and pointers modulo 16, is in the key that launches are kept by. On the host that is 34
to 38 µs per call in place of 87 to 172 (bench/overhead.py).
"""

import math
from contextlib import nullcontext
from operator import itemgetter
from typing import NamedTuple

import torch
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

empty, zeros = torch.empty, torch.zeros
bmm, baddbmm = torch.bmm, torch.baddbmm


class Operand(NamedTuple):
    """A tensor of a call, by its place among them; shape and strides as those of torch."""

    at: int
    shape: tuple
    strides: tuple
    dtype: torch.dtype

    def matrix(self):
        """[N, last dimension] of a dense tensor."""
        size = self.shape[-1]
        return self._replace(shape=(math.prod(self.shape[:-1]), size), strides=(size, 1))

    def t(self):
        return self._replace(shape=self.shape[::-1], strides=self.strides[::-1])


class View(NamedTuple):
    """Part of a tensor of a call: strides and where it begins in elements, from the tensor's own beginning."""

    at: int
    begin: int
    shape: tuple
    strides: tuple

    def of(self, values):
        tensor = values[self.at]
        return tensor.as_strided(self.shape, self.strides, tensor.storage_offset() + self.begin)

    def t(self):
        """With the last two dimensions exchanged."""
        (*first, m, n), (*at, stride_m, stride_n) = self.shape, self.strides
        return self._replace(shape=(*first, n, m), strides=(*at, stride_n, stride_m))


class Operands(tuple):
    """Those that a kernel takes as one tuple."""

    __slots__ = ()


def operands_of(tensors):
    """The `Operand` of each, None of None."""
    return (None if t is None else Operand(at, t.shape, t.stride(), t.dtype) for at, t in enumerate(tensors))


class Step:
    """A kernel with its grid, what it takes of a call's values, and after the first launch the compiled one."""

    __slots__ = ("_compiled", "_options", "_take", "grid", "kernel")

    def __init__(self, kernel, grid, take, options):
        self.kernel, self.grid, self._take, self._options = kernel, (*grid, 1, 1)[:3], take, options
        self._compiled = None

    @property
    def name(self):
        return self.kernel.fn.__name__.strip("_").removesuffix("_kernel")

    def launch(self, values, stream, hooked):
        """As Triton launches it; hooked: profilers listen, and get to know which kernel it is."""
        compiled = self._compiled
        if compiled is None:
            compiled = self.kernel[self.grid](*self._take(values), **self._options)
            if isinstance(compiled, CompiledKernel):
                self._compiled = compiled
        elif hooked:
            compiled[self.grid](*self._take(values), stream=stream)
        else:
            take = self._take(values)
            compiled.run(*self.grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *take)


class Product(NamedTuple):
    """out = a @ b (+ out) (+ bias), [batch, m, k] @ [batch, k, n], by torch's library."""

    a: View
    b: View
    out: View
    bias: View | None = None  # [n]
    added: bool = False

    name = "bmm"

    @property
    def grid(self):
        return self.out.shape

    def launch(self, values, stream, hooked):
        a, b, out = self.a.of(values), self.b.of(values), self.out.of(values)
        if self.added:
            baddbmm(out, a, b, out=out)
        else:
            bmm(a, b, out=out)
        if self.bias is not None:
            out.add_(self.bias.of(values))


class Layout:
    """What a call launches, as it is laid out; tensors: how many the call has."""

    def __init__(self, tensors):
        self._tensors, self._buffers, self._launches = tensors, [], []

    def buffer(self, size, dtype, zeroed=False):
        """The `Operand` of memory that every run allocates, of one size or a shape."""
        shape = size if isinstance(size, tuple) else (size,)
        strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
        self._buffers.append((size, dtype, zeroed))
        return Operand(self._tensors + len(self._buffers) - 1, shape, strides, dtype)

    def launch(self, kernel, grid, arguments):
        """Adds a launch. arguments: all that the kernel takes by name, `Operand`s, `Operands` and constants; Triton's
        options too."""
        options = dict(arguments)
        self._launches.append((kernel, grid, [options.pop(name) for name in kernel.arg_names], options))

    def product(self, a, b, out, bias=None, added=False):
        """Adds a `Product` of `View`s."""
        self._launches.append(Product(a, b, out, bias, added))

    def done(self):
        """The `Launches`, for which all that kernels take is numbered: tensors, buffers, tuples of these in their
        order, constants from the end."""
        tuples, constants, steps = {}, [], []
        first = self._tensors + len(self._buffers)
        for launch in self._launches:
            if isinstance(launch, Product):
                steps.append(launch)
                continue
            kernel, grid, args, options = launch
            places = []
            for arg in args:
                if type(arg) is Operand:
                    places.append(arg.at)
                elif type(arg) is Operands:
                    places.append(tuples.setdefault(arg, first + len(tuples)))
                else:
                    constants.append(arg)
                    places.append(-len(constants))
            steps.append(Step(kernel, grid, _getter(places), options))
        members = [_getter([operand.at for operand in each]) for each in tuples]
        return Launches(self._buffers, members, constants[::-1], steps)


class Launches:
    """Run any number of times, each with tensors alike; holds none."""

    def __init__(self, buffers, tuples, constants, steps):
        self._buffers, self._tuples, self._constants, self.steps = buffers, tuples, constants, steps

    def values(self, tensors, device):
        """All that the steps take, buffers allocated."""
        values = [*tensors]
        for size, dtype, zeroed in self._buffers:
            values.append((zeros if zeroed else empty)(size, dtype=dtype, device=device))
        for members in self._tuples:
            values.append(members(values))
        return values + self._constants

    def run(self, tensors, device):
        """Launches all on the device's stream in use."""
        values = self.values(tensors, device)
        with _chosen(device):
            stream, hooked = stream_of(device), _hooked()
            for step in self.steps:
                step.launch(values, stream, hooked)


def _getter(places):
    """A function from values to the tuple of those at places."""
    if len(places) == 1:
        (place,) = places
        return lambda values: (values[place],)
    return itemgetter(*places)


def _chosen(device):
    """Launches go to the device of the tensors."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)


def stream_of(device):
    """The stream in use, as the driver takes it."""
    return driver.active.get_current_stream(device.index) if device.type == "cuda" else None


def _hooked():
    """Whether Triton has hooks that are called at launches."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)
