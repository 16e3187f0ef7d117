"""Tests of the images in ``containers/``: built and run for real, with Docker and Apptainer.

As root. What the images are built from and what they are tested with lies in a cache, by content.
"""
