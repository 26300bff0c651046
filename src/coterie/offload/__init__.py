"""Expert stores: resident, cached, mixed-precision and simulated, with tiers and fetchers."""
