"""What runs on the nodes of a Dragon runtime."""
