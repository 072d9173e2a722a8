"""What activates each feature, what it means in words, and how well the words hold."""
