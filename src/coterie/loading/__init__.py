"""From a name to a model in memory: what is loaded, and where its experts are placed."""
