"""Which inputs a model is quantized for: texts, token windows, and the walk through the blocks that uses them."""
