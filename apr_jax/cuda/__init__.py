"""Hand-written CUDA C++ kernels of the forward pass, for NVIDIA GPUs of compute capability 9.0 (H100, H200).

A kernel is compiled to PTX, NVIDIA's assembly, when a program that uses it is traced, by NVRTC, the compiler library in
JAX's CUDA wheels; XLA's custom call for PTX runs it. So nothing has to be built when the package is installed.
`apr_jax.kernels.fastest_ops` decides which models and devices take these kernels.
"""
