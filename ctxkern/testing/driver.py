"""A driver for Triton that notes launches and makes none: what kernels would be given, and what a call costs Python.

Kernels are not compiled, tensors lie on the CPU and results hold nothing. In a process of its own, for all of it, in
which Triton's interpreter is off.
"""

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver, jit

from ctxkern import registry


class _Driver:
    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_active_torch_device(self):
        return torch.device("cpu")


class _Kernel(CompiledKernel):
    function = packed_metadata = metadata = src = None

    def __init__(self, name):
        self.name = name

    def _init_handles(self):
        pass

    @property
    def run(self):
        return self._run

    def _run(self, x, y, z, stream, function, packed, metadata, enter, exit, *args):
        if enter is not None:
            enter(metadata)
        _LAUNCHES.append((self.name, (x, y, z), args))
        if exit is not None:
            exit(metadata)


_LAUNCHES = []


def _compiled(self, key, signature, device, *_):
    kernel = self.device_caches[device][0][key] = _Kernel(self.fn.__name__)
    return kernel


def note_launches():
    """The list of launches, (kernel, grid, arguments) each, that the backend `triton` makes from now on."""
    driver.set_active(_Driver())
    jit.JITFunction._do_compile = _compiled
    registry.statuses["triton"] = registry.Status("available")
    registry._ON_CPU["triton"] = lambda: True
    return _LAUNCHES
