"""From rows of instruction data to batches: rows, template, tokens, alignment, collation, and their order."""
