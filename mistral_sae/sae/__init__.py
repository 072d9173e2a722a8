"""The sparse autoencoder: maths, training, checkpoints, and figures about its features. It knows no language model."""
