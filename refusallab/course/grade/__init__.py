"""Grading a class: submissions are found, run in a sandbox, judged outside of it, recorded and reported.

In the sandbox (zygote, confine, probe, plain) is the student's code, and nothing that the student must not know.
Outside, everything else reads plain data from the sandbox; expected values and the seed stay there.
"""
