"""Small worlds of our own, on which every method can be seen to learn."""
