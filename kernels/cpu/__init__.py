"""The kernels for CPUs: C sources, the library built from them on the user's machine, and its Python side."""
