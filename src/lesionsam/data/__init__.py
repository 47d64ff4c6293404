"""Where images, masks and boxes come from, and how they become batches."""
