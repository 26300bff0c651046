"""Where code that a model wrote may run: it can harm nothing, and leaves nothing behind."""
