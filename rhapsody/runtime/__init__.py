"""Private machinery that the rooms share; nothing here is public API."""
