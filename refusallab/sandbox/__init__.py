"""Running untrusted code with limits: kernels behind a wall, and nothing but plain data comes out.

Inside are a read-only system, Python, this library and the code that runs. Outside, everything else reads plain data.
The grader uses it for a class, lab 10 for submitted defences, `make test` for fast kernels without a wall.
"""
