"""From raw files to packed sequences: cards, readers, preparation, splits."""
