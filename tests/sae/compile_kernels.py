"""Compile the Triton kernels for a GPU that need not be there, at full size: a line of JSON each with what it takes.

`python tests/sae/compile_kernels.py 90`; test_fused.py reads the lines.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
import triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
from mistral_sae.sae.kernels import fused

GRADIENT = ("*i64", "*fp32", "*i64", "*fp32")
GRADIENTS = (*GRADIENT, None, None), (*GRADIENT, "*i32", "*fp32")  # without rows on top, and with


WIDTHS = (4096, 8192)  # Mistral 7B's, and the widest at which nothing spills


def variants():
    """The kernels as a step starts them: arguments that are types, or constants."""
    yield fused.inner_products_kernel, 4, {
        "x": "*fp32", "indices": "*i64", "rows": "*fp32", "out": "*fp32", "K": "i32", "D": "i32",
        "ROWS": fused.ROWS, "WIDTH": fused.WIDTH,
    }  # fmt: skip
    for gradient, rows in zip(GRADIENTS, ("*fp32", None), strict=True):
        yield fused.squares_kernel, 4, {
            "gradient": gradient, "rows": rows, "products": rows, "out": "*fp32", "D": "i32",
            "COLUMNS": fused.COLUMNS, "TERMS": fused.TERMS,
        }  # fmt: skip
    for d_model in WIDTHS:
        columns, terms, warps = fused.row_shape(d_model)
        for moments in ("*fp32", "*bf16"):
            for copy, along in (("*bf16", None), (None, "*fp32")):  # of the encoder, of the decoder
                yield fused.adam_rows_kernel, warps, {
                    "state": ("*fp32", moments, moments, copy), "gradient": GRADIENTS[1], "along": along,
                    "rates": "*fp32", "learning_rate": "fp32", "D": "i32", "COLUMNS": columns, "TERMS": terms,
                }  # fmt: skip


def compiled(kernel, warps, arguments, capability):
    """The kernel as `triton.compile` makes it where pointers and D are multiples of 16, as in a training."""
    constants, multiples = {}, {}

    def types(value, path):
        if isinstance(value, tuple):
            return tuple(types(part, (*path, i)) for i, part in enumerate(value))
        if not isinstance(value, str):
            constants[path] = value
            return "constexpr"
        if value.startswith("*") or path == (kernel.arg_names.index("D"),):
            multiples[path] = [["tt.divisibility", 16]]
        return value

    signature = {name: types(arguments[name], (i,)) for i, name in enumerate(kernel.arg_names)}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=multiples)
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": warps, **fused.OPTIONS}
    )


def main():
    capability = int(sys.argv[1])
    tool = Path(triton.backends.nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        for kernel, warps, arguments in variants():
            made = compiled(kernel, warps, arguments, capability)
            path.write_bytes(made.asm["cubin"])
            listing = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
            used = {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", listing)}
            print(json.dumps({"kernel": kernel.__name__, "shared": made.metadata.shared} | used))


if __name__ == "__main__":
    main()
