"""Convolution functions that plain modules call in their own code."""
