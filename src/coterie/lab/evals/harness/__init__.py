"""An lm-evaluation-harness model for Coterie; needs the extra ``harness``."""
