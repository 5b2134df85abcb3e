"""Weight vectors on spheres: measures, projections, tangent and rotating updates."""
