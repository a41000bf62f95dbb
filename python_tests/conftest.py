"""Test settings that hold everywhere."""

from hypothesis import settings

# The same examples on every run: a gate that sometimes closes by itself stops being believed. Search for new
# failures with --hypothesis-profile=explore.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile("repeatable")
