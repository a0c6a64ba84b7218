"""Text files as training data: found, decoded, read as items, cut into windows, and mixed into batches."""
