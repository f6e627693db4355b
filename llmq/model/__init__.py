"""The Llama family: what a configuration means, the model itself, its cache, its tokenizer, and generation.

Nothing is imported here, so that `llmq.model.config` can be had without torch.
"""
