"""The models: one vision tower, an embedder that turns texts and videos into unit vectors, a policy that judges a video."""
