"""Accuracy of routing policies: the same problems under every policy, compared item by item."""
