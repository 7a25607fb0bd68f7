"""A user's model: run it, look at it, and leave it as it was."""
