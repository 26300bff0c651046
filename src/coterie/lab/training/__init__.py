"""Training of the embedded model: data, network, optimiser, loop, export."""
