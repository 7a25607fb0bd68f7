"""Where convolutions are, and from ``where=`` to sites."""
