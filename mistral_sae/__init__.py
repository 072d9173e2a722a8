"""Sparse autoencoders for Mistral language models: train, explain, steer."""
