"""Where the numbers of a layer lie in the image, as the autograd graph of one pass states it."""
