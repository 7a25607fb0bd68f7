"""torch beside a file."""
