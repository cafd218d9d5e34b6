"""Restores what `apr-jax checkpoint save MODEL DIR` wrote, onto a mesh of this program's own, with Orbax alone.

    python restore_with_orbax.py DIR

Nothing of apr_jax is imported. A matrix is cut by rows over all devices where its rows divide; a program puts its own
shardings there.
"""

import json
import pathlib
import sys
import zlib

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def restore(folder):
    """Returns the parameters, nested as HuggingFace's names are: {"model": {"layers": {"0": {"mlp": ...}}}}."""
    mesh = Mesh(np.array(jax.devices()), ("model",))

    def placed(array):
        rows = "model" if array.shape[0] % mesh.size == 0 else None
        return ocp.ArrayRestoreArgs(sharding=NamedSharding(mesh, PartitionSpec(rows)), dtype=array.dtype)

    with ocp.PyTreeCheckpointer() as checkpointer:
        saved = checkpointer.metadata(folder / "parameters").item_metadata.tree
        return checkpointer.restore(folder / "parameters", restore_args=jax.tree.map(placed, saved))


def main():
    """Restores, and compares each parameter with the CRC-32 that was saved beside it."""
    jax.config.update("jax_enable_x64", True)  # else float64 would become float32
    folder = pathlib.Path(sys.argv[1]).resolve()
    known = json.loads((folder / "prepared.json").read_text())["parameters"]
    for path, array in jax.tree_util.tree_flatten_with_path(restore(folder))[0]:
        name = ".".join(key.key for key in path)
        checksum = f"{zlib.crc32(np.asarray(array).tobytes()):08x}"
        assert checksum == known.pop(name)["crc32"], name
        print(checksum, array.dtype, list(array.shape), f"on {len(array.devices())} devices", name)
    assert not known, f"not restored: {list(known)}"


if __name__ == "__main__":
    main()
