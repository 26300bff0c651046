"""Every table and figure of the paper, on any model, from records that are kept."""
