"""C++ kernels: their build, their dispatch, their PyTorch reference."""
