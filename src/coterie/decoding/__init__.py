"""How a row is filled: where to look, what to propose, what to keep. No model is known here."""

from coterie.decoding.plans import Plan, parse_plan
from coterie.decoding.refine import Unmask, parse_unmask
from coterie.decoding.row import Ask, Change, Row, Token
from coterie.decoding.sampling import Sampling

__all__ = [
    "Ask",
    "Change",
    "Plan",
    "Row",
    "Sampling",
    "Token",
    "Unmask",
    "parse_plan",
    "parse_unmask",
]
