"""Coordinates that other code has left behind."""
