"""The published form of CoordConv, conv([x ; c]): what other code has, imported, loaded and written."""
