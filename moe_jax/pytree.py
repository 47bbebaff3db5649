"""The type of an array field in a dataclass that is registered as a pytree.

JAX rebuilds such a dataclass around whatever a transformation maps over: tracers, shapes,
shardings, host arrays, placeholders. Annotations are checked at run time in the tests and must
allow all of these; the suffix of a field's name and its docstring say which axes it has.
"""

from typing import Any, TypeAlias

Leaf: TypeAlias = Any
