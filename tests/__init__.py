from tests import checker as checker  # jaxtyping looks it up as an attribute
