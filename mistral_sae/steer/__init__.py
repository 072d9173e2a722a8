"""The model with its features edited, and what that does to its text."""

import sys
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any


class _Room(ModuleType):
    """This package under the name that its main function has in `mistral_sae`: calling it calls that function."""

    def __call__(self, *args: Any, **options: Any) -> AbstractContextManager[None]:
        """See `mistral_sae.steer.steering.steer`."""
        from mistral_sae.steer.steering import steer

        return steer(*args, **options)


sys.modules[__name__].__class__ = _Room
