"""FLOPs of the matrix products in a program that was compiled for a GPU."""

import math
import re

from stable_lora_jax.planning import program

_PRODUCT = re.compile(r"%([\w.\-]+) = (\(.*?\)|\S+) (dot|custom-call)\((?:\w+\[[\d,]*\]\S* )?%([\w.\-]+)")
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)')


def product_flops(text: str) -> int:
    """Returns the FLOPs of a step's products: those of XLA's own kernels, and of cuBLAS.

    Args:
      text: `compiled.as_text()`.
    """
    entry, bodies = program._computations(text)
    runs, _ = program._runs(entry, bodies)
    total = 0
    for name, lines in bodies.items():
        shapes = dict(re.findall(r"%([\w.\-]+) = (\(.*?\)|\S+) ", "\n".join(lines)))
        for line in lines:
            match = _PRODUCT.search(line)
            if match and (match[3] == "dot" or "__cublas" in line):
                contracted = _CONTRACTED.search(line)
                assert contracted, line
                left = _sizes(shapes[match[4]])
                summed = math.prod(left[int(axis)] for axis in contracted[1].replace('"', "").split(","))
                total += 2 * runs[name] * math.prod(_sizes(match[2])) * summed
    return total


def _sizes(shape: str) -> list[int]:
    """Returns the sizes of an array, or of a tuple's first."""
    found = re.search(r"\[([\d,]*)\]", shape)
    assert found, shape
    return [int(size) for size in found[1].split(",") if size]
