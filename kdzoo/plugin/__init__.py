"""Which kinds of plugin there are, how plugins are found and loaded, and what they declare.

`discovery` and `declarations` import no torch; `kinds` and `registry` do.
"""
