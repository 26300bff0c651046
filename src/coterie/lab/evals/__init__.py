"""What a routing policy costs: the same problems under every policy, compared item by item."""
