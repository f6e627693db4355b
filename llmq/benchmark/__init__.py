"""How fast: one timing loop, bytes and FLOPs as pure functions, this machine's measured limits, decode and kernels."""
