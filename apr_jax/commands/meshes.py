"""Where a command's model goes: on one device, or over the mesh that --mesh asks for."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jax.sharding import Mesh


def placement(args: argparse.Namespace, device: str) -> str | Mesh:
    """Returns `device`, or with --mesh a mesh of devices of its kind.

    Raises:
      UsageError: There are not as many, or `device` is a single one ("cuda:1").
    """
    from apr_jax.load.load_model import find_mesh

    return device if args.mesh is None else find_mesh(args.mesh, device)
