"""A folder for PYTHONPATH, see ``small_machine`` beside it."""
