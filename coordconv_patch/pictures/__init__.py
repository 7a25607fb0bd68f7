"""Where pictures come from: data pipelines and tilers, and the places that they give samples."""
