"""What the coordinates of a patched model contribute now, site by site: figures and pictures."""
