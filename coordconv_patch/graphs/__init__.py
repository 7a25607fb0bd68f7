"""What torch.fx and torch.export tell of a model."""
