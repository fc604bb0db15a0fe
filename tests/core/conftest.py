"""Hypothesis for tests on shared machines: no deadlines, which would fail by chance."""

from hypothesis import settings

settings.register_profile("steady", deadline=None)
settings.load_profile("steady")
