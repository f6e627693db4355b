"""What the stored numbers mean: grids, affine quantization, packing, the quantized weight."""
