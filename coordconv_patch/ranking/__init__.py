"""Where would coordinates help? Convolutions tried out one by one, on copies, and ranked."""
