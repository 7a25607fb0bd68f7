"""Batch norms, and what other libraries fold."""
