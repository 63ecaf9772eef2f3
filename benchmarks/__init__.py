"""Measurements: kernels, wire format, simulation, the paper's experiments. Not part of the package.

Run a benchmark from the root of the source tree, for example ``python -m benchmarks.fashion_mnist run``.
"""
