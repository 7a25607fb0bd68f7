"""What a coordinate convolution is: coordinates, geometry, branch, the layers."""
