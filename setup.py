"""Everything is declared in pyproject.toml; building the native extension will be added here."""

from setuptools import setup

setup()
