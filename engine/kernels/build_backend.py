"""Setuptools as the package's build backend, with this project where Python finds it: its build step is `build.py`."""

from setuptools.build_meta import *  # noqa: F403
