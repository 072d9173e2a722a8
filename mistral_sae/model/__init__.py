"""The language model: its folder, tokenizer, engines, and hooks that read and edit its residual stream."""
