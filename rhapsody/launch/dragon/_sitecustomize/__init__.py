"""A folder for PYTHONPATH; see ``idle_patches``."""
