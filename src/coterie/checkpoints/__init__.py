"""Checkpoint folders: locating, inspecting, converting and verifying them."""
