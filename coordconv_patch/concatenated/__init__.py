"""The published form of CoordConv, conv([x ; c]), from other code and back to it."""
