"""One module for each command of ``fewshot-ext``."""
