"""Plans: the configurations of a model that fit a machine, and their predicted times."""
