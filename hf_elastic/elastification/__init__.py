"""Making a family: scores, order, sizes."""
