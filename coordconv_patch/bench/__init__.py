"""What coordinates cost at inference."""
