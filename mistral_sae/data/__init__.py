"""Text to rows of tokens to residual activations."""
