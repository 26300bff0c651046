"""Checkpoint folders: finding, describing, converting and verifying them."""
