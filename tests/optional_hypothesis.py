"""hypothesis, or where it is missing stand-ins under which a property is skipped and the rest of a file runs.

GPU machines often lack it, and the other tests of these files are what they are for.
"""

import pytest

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ModuleNotFoundError:

    class _Absent:
        """Stands for any strategy."""

        def __getattr__(self, name):
            return lambda *arguments, **named: self

        __call__ = __or__ = lambda self, *arguments, **named: self

    st = _Absent()

    def given(*arguments, **named):
        def skipped(test):
            def property_is_skipped():
                pytest.skip("hypothesis is not installed")

            property_is_skipped.__name__ = test.__name__
            return property_is_skipped

        return skipped

    def settings(*arguments, **named):
        return lambda test: test


__all__ = ["given", "settings", "st"]
