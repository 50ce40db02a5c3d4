"""How a program compiles kernels for a GPU that is not there."""

from __future__ import annotations

TARGET = """
import sys
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

capability = int(sys.argv[1])


class Driver:
    def get_current_target(self): return GPUTarget("cuda", capability, 32)
    def get_current_device(self): return 0
    def get_current_stream(self, device): return 0
    def get_device_capability(self, device): return divmod(capability, 10)


driver.set_active(Driver())
"""
"""Begins such a program, whose first argument is the capability (80, 90); kernels are then to be run with `warmup=True`."""
