"""Records what ggml makes of some values as K-quants: `python tests/data/record_k_quants.py GGML`, with gcc.

GGML: the folder vendor/llama.cpp/ggml of the source archive of PyPI's llama-cpp-python (0.3.36 for what is there). Its
ggml-quants.c alone is compiled, without contracted operations; k_quants.npz holds the bytes of its
`quantize_row_*_K_ref` for the two arrays of tests/k_quant_values.py.
"""

from __future__ import annotations

import ctypes
import pathlib
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import numpy as np  # noqa: E402

from tests import k_quant_values  # noqa: E402

# What ggml-quants.c asks of others: nothing that quantising calls.
_OTHERS = """
#include <stdlib.h>
void ggml_abort(const char * f, int l, const char * m, ...) { abort(); }
size_t ggml_row_size(int t, long n) { abort(); }
const char * ggml_type_name(int t) { abort(); }
size_t ggml_type_size(int t) { abort(); }
float ggml_table_f32_f16[65536];
"""


def library(ggml: pathlib.Path, folder: pathlib.Path) -> ctypes.CDLL:
    (folder / "others.c").write_text(_OTHERS)
    include = [f"-I{ggml / part}" for part in ("include", "src", "src/ggml-cpu")]
    sources = [ggml / "src/ggml-quants.c", folder / "others.c"]
    options = ["-O2", "-ffp-contract=off", "-std=c11", "-D_GNU_SOURCE", "-fPIC", "-shared"]
    subprocess.run(["gcc", *options, *include, *sources, "-o", folder / "quants.so", "-lm"], check=True)
    return ctypes.CDLL(str(folder / "quants.so"))


def quantised(lib: ctypes.CDLL, name: str, values: np.ndarray) -> np.ndarray:
    out = np.zeros(values.size // 256 * k_quant_values.BLOCK_BYTES[name], np.uint8)
    function = getattr(lib, f"quantize_row_{name.replace('_k', '_K')}_ref")
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    function(values.ctypes.data, out.ctypes.data, values.size)
    return out


def main(ggml: pathlib.Path) -> None:
    arrays = {"weight": k_quant_values.weight(), "hard": k_quant_values.hard()}
    with tempfile.TemporaryDirectory() as folder:
        lib = library(ggml, pathlib.Path(folder))
        made = {
            f"{label}.{name}": quantised(lib, name, np.ascontiguousarray(values))
            for label, values in arrays.items()
            for name in k_quant_values.BLOCK_BYTES
        }
    np.savez_compressed(HERE / "k_quants.npz", **made)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
