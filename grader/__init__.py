"""Grading a class: submissions are found, run in the sandbox, judged outside of it, recorded and reported.

Expected values and the seed stay here, outside: the sandbox sees the library, and not this package.
"""
