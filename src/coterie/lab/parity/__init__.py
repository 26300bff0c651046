"""Parity with published code: reruns its recorded forwards and generations, and compares."""
