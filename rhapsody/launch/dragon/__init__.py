"""Dragon's command line, and what its launcher needs to run and to end."""
