"""Parity with published code: its recorded forwards and generations, run again and compared."""
