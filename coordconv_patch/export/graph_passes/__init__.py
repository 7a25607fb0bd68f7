"""Rewrites of the exported graph, one a file."""
