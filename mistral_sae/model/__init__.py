"""The language model: its folder, tokenizer, backends, and hooks that read and edit its residual stream."""
