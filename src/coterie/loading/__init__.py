"""Loading a model: its expert memory, and the placement of its experts."""
