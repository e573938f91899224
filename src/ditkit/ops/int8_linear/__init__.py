"""Linear layers of whole numbers: quantised rows times quantised weights, summed in int32."""

from ditkit.ops.int8_linear.kernels import KERNELS, Kernel, Packed, fastest, find, measure
from ditkit.ops.int8_linear.pack import pack4, unpack4
from ditkit.ops.int8_linear.reference import dequantise, linear_reference, quantise

__all__ = [
    "KERNELS",
    "Kernel",
    "Packed",
    "dequantise",
    "fastest",
    "find",
    "linear_reference",
    "measure",
    "pack4",
    "quantise",
    "unpack4",
]
