"""The process that starts child processes, and outlives the driver to end them."""
