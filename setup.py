"""The one packaging variant that works in every install mode.

``kernels/`` lies at the top level for people, but is the package ``phmdiff_fast.kernels``; it has no
__init__.py, because a top-level package of that name would shadow another well-known one.
"""

from setuptools import setup

setup(
    packages=["phmdiff_fast", "phmdiff_fast.kernels"],
    package_dir={"phmdiff_fast": "phmdiff_fast", "phmdiff_fast.kernels": "kernels"},
)
