"""What quantization cost: perplexity under named protocols, divergence from a reference, lm-eval tasks."""
