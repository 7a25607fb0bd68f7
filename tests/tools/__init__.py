"""What people train models with, run on patched models: each tool against plain torch."""
