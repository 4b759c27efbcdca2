"""What a plugin is (contracts), how it is found and loaded, and what it declares.

`hooks`, `discovery` and `declarations` import no torch; `contracts` and `registry` do.
"""
