"""moe_jax: where the experts of a Mixture-of-Experts model live, and what that is worth."""
