"""How every figure looks, whoever draws it."""
