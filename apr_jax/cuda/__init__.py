"""Kernels in CUDA C++, compiled by NVRTC when a program that uses them is traced.

The carrier is XLA's custom call for PTX, so that nothing has to be built when the package is installed; JAX's own CUDA
wheels bring NVRTC. Which models and devices take these kernels is decided in `apr_jax.kernels.fastest_ops`.
"""
