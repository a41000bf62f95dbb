"""The operators that test_contract.py holds to the contract: a new one joins by an entry here."""

from .coding_rate_case import coding_rate
from .emd_case import emd
from .episode_finetune_case import finetune
from .margin_softmax_case import margin_cosine, margin_softmax

OPERATORS = (margin_cosine, margin_softmax, emd, finetune, coding_rate)
