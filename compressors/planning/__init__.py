"""What will be done to every matrix: from shapes, from singular values, or from an edited file."""
