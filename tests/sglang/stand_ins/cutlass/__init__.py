"""A stand-in, see ``stand_in``."""

from stand_in import replace_package

__version__ = "0.0.0"

replace_package(__name__)
