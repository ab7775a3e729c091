"""Where an agent's Python code runs: a process per trajectory that is kept away from the machine, see docs/sandbox.md.

`session` is for those who have code run, `settings` has the limits. Whoever starts a process: `launcher`, and inside of
it `zygote`, `child` and `notebook`, confined by `confinement`. Nothing here knows an env or a prompt. This file imports
nothing, since the inner modules are imported where the rest of the package can't be read.
"""
