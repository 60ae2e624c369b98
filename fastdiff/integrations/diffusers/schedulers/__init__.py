"""The records of diffusers' schedulers. Every file here has a dictionary ``SCHEDULERS``, which ``supported.py`` finds:
{name of the class in diffusers: {name of a method: ``Method``}}. How to add one: CONTRIBUTING.md, "A diffusers
scheduler".
"""
