"""The forms that a coordinate branch takes in a file."""
