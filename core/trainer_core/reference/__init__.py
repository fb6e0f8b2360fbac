"""Writes the reference pages from the code: hooks, settings, the data backend file, a schema."""
