"""Dragon's command line, and what its launcher needs around it."""
