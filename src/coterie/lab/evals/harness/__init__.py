"""Coterie as a model of lm-evaluation-harness; needs the extra ``harness``."""
