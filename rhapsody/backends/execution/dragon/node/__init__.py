"""What runs on the nodes of a Dragon runtime, and the messages between it and the driver."""
