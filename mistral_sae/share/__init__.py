"""What leaves this project: an autoencoder and its features in the forms of other tools, and on the hub."""
