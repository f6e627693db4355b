"""Who multiplies: quantized weights as tensors, and the kernels that run them."""
