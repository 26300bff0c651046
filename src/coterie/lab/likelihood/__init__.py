"""Likelihood of given text: Monte-Carlo bounds, paired between policies."""
