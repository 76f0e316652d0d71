"""Environment variables that switch compilation on and off, read whenever something is compiled or made.

==========================  ==================================  =====================================================
variable                    values                              effect
==========================  ==================================  =====================================================
``PYROVAE_COMPILE``         ``eager``, ``aten``, ``inductor``   the most that is done to a step: run as it is, capture
                                                                its graph, compile the graph (the default)
``PYROVAE_NATIVE``          ``none``, ``decoder``, ``all``      our own C++: nothing; the decoder and the normals; the
                                                                matrix products as well (the default)
``PYROVAE_CXX_FLAGS``       flags of the C++ compiler           appended to those that our C++ is compiled with
``PYROVAE_CACHE``           a folder                            where measured choices are kept
==========================  ==================================  =====================================================
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

__all__ = ["BACKENDS", "NATIVE", "cache_folder", "cxx_flags", "limit_backend", "native_level"]

BACKENDS = ("eager", "aten", "native", "inductor")
NATIVE = ("none", "decoder", "all")


def limit_backend(backend: str) -> str:
    """``backend``, or what ``PYROVAE_COMPILE`` allows if that is less.

    Raises:
        ValueError: ``PYROVAE_COMPILE`` has a value that it must not have.

    Example:
        >>> import os
        >>> from pyrovae.compile.settings import limit_backend
        >>> before = os.environ.get("PYROVAE_COMPILE")
        >>> os.environ["PYROVAE_COMPILE"] = "aten"
        >>> limit_backend("inductor"), limit_backend("eager")
        ('aten', 'eager')
        >>> del os.environ["PYROVAE_COMPILE"]
        >>> if before is not None: os.environ["PYROVAE_COMPILE"] = before
    """
    return BACKENDS[min(BACKENDS.index(backend), BACKENDS.index(_choice("PYROVAE_COMPILE", BACKENDS)))]


def native_level() -> str:
    """What ``PYROVAE_NATIVE`` allows of our C++: ``"none"``, ``"decoder"`` or ``"all"``.

    Raises:
        ValueError: ``PYROVAE_NATIVE`` has a value that it must not have.
    """
    return _choice("PYROVAE_NATIVE", NATIVE)


def cxx_flags() -> tuple[str, ...]:
    """The flags of ``PYROVAE_CXX_FLAGS``, split as a shell would."""
    return tuple(shlex.split(os.environ.get("PYROVAE_CXX_FLAGS", "")))


def cache_folder() -> Path:
    """Where measured choices are kept: ``PYROVAE_CACHE``, or ``pyrovae`` in the user's cache folder."""
    own = os.environ.get("PYROVAE_CACHE")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pyrovae"


def _choice(variable: str, values: tuple[str, ...]) -> str:
    value = os.environ.get(variable) or values[-1]
    if value not in values:
        raise ValueError(f"{variable} must be {', '.join(values[:-1])} or {values[-1]}, got {value!r}: change it or unset it.")
    return value
