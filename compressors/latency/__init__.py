"""Times of products with dense and compressed weights on one device, measured and interpolated."""
